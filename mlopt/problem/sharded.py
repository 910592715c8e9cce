"""The conditions under which levels may be sharded over processes: what is refused when a problem is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import ProblemError
from ..ranks import Ranks
from ..shards import is_sharded, reshard, units
from .level import Level

__all__ = ["require_shards"]


def require_shards(
    levels: Sequence[Level], sharded: frozenset[str], pulled: Mapping[str, Sequence[str]], ranks: Ranks
) -> None:
    """Raise if processes cannot share levels some of which are sharded.

    Args:
        levels: outermost first.
        sharded: the names of those that are.
        pulled: by level that cotangents are pulled back through, the levels inside it.
        ranks: the processes.

    Raises:
        ProblemError: a level is sharded in another way than over all processes of the problem, or uses what needs second
            derivatives or whole vectors.
    """
    if levels[0].name in sharded:
        raise ProblemError(
            f"level {levels[0].name!r}: fully_shard has sharded it, and it is the outermost level; "
            "give its module before it is sharded"
        )
    for level in levels:
        faults = [*_of_any(level, pulled)]
        if level.name in sharded:
            faults += _of_shards(level, ranks)
        for state, remedy in faults:
            raise ProblemError(
                f"level {level.name!r}: {state}, which is not supported beside levels that fully_shard has sharded "
                f"({', '.join(sorted(sharded))}); {remedy}"
            )


def _of_shards(level: Level, ranks: Ranks) -> Iterator[tuple[str, str]]:
    """Yield what is not supported of a sharded level, each with the remedy."""
    if not level.sharded:
        yield (
            "its module was not given to fully_shard when the level was made, and has sharded parameters",
            "call fully_shard(module) on the level's module itself, after its parts, and make the level then",
        )
    reshard((level.module,))
    for name, parameter in level.module.named_parameters():
        if fault := _fault(parameter, ranks):
            yield f"parameter {name!r} {fault}", "call fully_shard with a mesh of one dimension over all processes"
    if any(setting for unit in units(level.module) for setting in _settings(unit)):
        yield (
            "a part of its module has a MixedPrecisionPolicy, or does not take the mean of gradients",
            'leave both as they are by default; Level(precision="bf16") takes the steps under autocast',
        )
    if level.precision == "fp16":
        yield "precision='fp16' scales the loss until a process overflows", "use precision='bf16'"


def _of_any(level: Level, pulled: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str]]:
    """Yield what is not supported of a level beside a sharded one, or of that one, each with the remedy."""
    before = "or give the modules before they are sharded"
    if level.residual is not None or level.solver is not None or getattr(level.loss, "over_tasks", False):
        kind = "a residual" if level.residual is not None else "a solver" if level.solver is not None else "tasks"
        yield f"it has {kind}", f"use a loss and an optimizer, {before}"
    if level.response is not None:
        yield f"response={level.response}", f"leave it out, and give the levels inside an estimator, {before}"
    if level.name not in pulled or level.estimator is None:
        return
    if interior := pulled[level.name]:
        yield (
            f"cotangents are pulled back through it and through {', '.join(map(repr, interior))} inside it",
            f"flatten the nest, {before}",
        )
    if reason := level.estimator.needs_whole:
        yield (
            f"estimator={level.estimator}: {reason}",
            "use FiniteDifference(), ConjugateGradient(products='finite_difference') or ValueFunction()",
        )


def _fault(parameter: Any, ranks: Ranks) -> str:
    """Return what is not supported about a parameter of a sharded level, or ""."""
    if not is_sharded(parameter):
        return "is not sharded"
    mesh, placements = parameter.device_mesh, parameter.placements
    if mesh.ndim != 1 or not all(type(place).__name__ == "Shard" for place in placements):
        return f"has the placements {placements} on a mesh of {mesh.ndim} dimensions"
    return "" if ranks.are_those_of(mesh.get_group()) else "is sharded over other processes than those of the problem"


def _settings(unit: Any) -> Iterator[bool]:
    """Yield whether settings of a part given to `fully_shard` change its gradients."""
    state = unit._get_fsdp_state()
    for group in getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]:
        policy = getattr(group, "mp_policy", None)
        yield any(getattr(policy, name, None) is not None for name in ("param_dtype", "reduce_dtype", "output_dtype"))
        yield getattr(group, "gradient_divide_factor", None) is not None
        yield not getattr(group, "reduce_grads", True)
