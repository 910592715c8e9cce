"""Levels that are sharded over processes: their derivatives, and the conditions under which they are supported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import ProblemError
from ..ranks import Ranks
from ..shards import is_sharded, reshard, units, whole
from .estimator import Block, Vectors

if TYPE_CHECKING:
    from .level import Level
    from .problem import Problem

__all__ = ["backward", "require_shards"]


def backward(
    value: Tensor, wanted: Sequence[Block], values: Vectors, *, retain_graph: bool = False
) -> dict[Block, tuple[Tensor | None, ...]]:
    """Return the derivatives of a scalar by blocks of live variables, by a backward pass whose hooks sum over processes.

    With L_r the scalar of process r, the derivatives by sharded variables are those of sum_r L_r, and sharded as they are. Those
    by whole variables are of L_r. None stands for a variable that the scalar does not use. `.grad` remains as it was.

    Args:
        value: a scalar with a graph.
        wanted: the blocks.
        values: the live variables of each block; of all blocks that the scalar depends on.
        retain_graph: as in `Tensor.backward`.
    """
    leaves = [variable for variables in values.values() for variable in variables]
    kept = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    hooks = [leaf.register_hook(partial(_placed, leaf)) for leaf in leaves if is_sharded(leaf)]  # type: ignore[no-untyped-call]
    try:
        # Hooks do not run for gradients that torch.autograd.grad or `inputs` ask for.
        value.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]
        return {block: tuple(_gradient(variable) for variable in values[block]) for block in wanted}
    finally:
        for hook in hooks:
            hook.remove()
        for leaf, gradient in zip(leaves, kept, strict=True):
            leaf.grad = gradient


def _gradient(variable: Any) -> Tensor | None:
    gradient = variable.grad
    if gradient is None:
        return None
    if not is_sharded(variable):
        return whole(gradient)  # sharded, if the variable multiplies a number of sharded ones
    # The hooks take a mean. A regularizer that reads the shards without a forward pass is divided by the number of processes.
    return gradient * float(variable.device_mesh.size())  # type: ignore[no-any-return]


def _placed(variable: Any, gradient: Any) -> Tensor:
    """Return the gradient of a regularizer by a sharded variable with the variable's shards, to which a unit adds that of a loss."""
    return gradient.redistribute(placements=variable.placements).clone()  # type: ignore[no-any-return]


def require_shards(problem: Problem) -> None:
    """Raise if the processes cannot share levels some of which are sharded.

    Raises:
        ProblemError: a level is sharded in another way than over all processes of the problem, or uses what needs second
            derivatives or whole vectors.
    """
    for level in problem:
        for state, remedy in (*_of_shards(level, problem), *_of_any(level, problem)):
            raise ProblemError(
                f"level {level.name!r}: {state}, and levels sharded by fully_shard ({', '.join(sorted(problem.sharded))}) are not "
                f"supported with that; {remedy}"
            )


def _of_shards(level: Level, problem: Problem) -> Iterator[tuple[str, str]]:
    """Yield what is not supported of a sharded level, each with the remedy."""
    if level.name not in problem.sharded:
        return
    if level is problem.outermost:
        yield "it is the outermost level and sharded", "give its module before it is sharded"
    if not level.sharded:
        yield (
            "its module was not given to fully_shard when the level was made, and has sharded parameters",
            "call fully_shard(module) on the level's module itself, after its parts, and make the level then",
        )
    reshard((level.module,))
    for name, parameter in level.module.named_parameters():
        if fault := _fault(parameter, problem.ranks):
            yield f"parameter {name!r} {fault}", "call fully_shard with a mesh of one dimension over all processes"
    if any(setting for unit in units(level.module) for setting in _settings(unit)):
        yield (
            "a part of its module has a MixedPrecisionPolicy, or does not take the mean of gradients",
            'leave both as they are by default; Level(precision="bf16") takes the steps under autocast',
        )
    if level.precision == "fp16":
        yield "precision='fp16' scales the loss until a process overflows", "use precision='bf16'"


def _of_any(level: Level, problem: Problem) -> Iterator[tuple[str, str]]:
    """Yield what is not supported of a level beside a sharded one, or of that one, each with the remedy."""
    before = "or give the modules before they are sharded"
    if level.residual is not None or level.solver is not None or getattr(level.loss, "over_tasks", False):
        kind = "a residual" if level.residual is not None else "a solver" if level.solver is not None else "tasks"
        yield f"it has {kind}", f"use a loss and an optimizer, {before}"
    if level.response is not None:
        yield f"response={level.response}", f"leave it out, and give the levels inside an estimator, {before}"
    if not problem.needs_estimator(level.name) or level.estimator is None:
        return
    if interior := problem.graph[level.name].interior:
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
