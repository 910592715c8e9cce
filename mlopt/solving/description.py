"""What a checkpoint says of the problem that it is of, and how that compares with the problem at hand."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from ..errors import CheckpointError, CheckpointWarning
from ..problem import Level, Problem

__all__ = ["compare", "described"]

#: Arguments of a level that may differ between a checkpoint and the problem that goes on from it.
_SETTINGS = ("estimator", "scheduler", "steps", "warmup", "accumulate", "clip", "precision", "batches")


def described(
    problem: Problem, optimizers: Mapping[str, Optimizer], schedulers: Mapping[str, Any], *, lookahead: bool
) -> dict[str, Any]:
    """Return what tells one problem from another: levels, variables, optimisers, settings."""
    levels = {level.name: _level(level, optimizers[level.name], schedulers[level.name]) for level in problem}
    return {"levels": levels, "lookahead": lookahead}


def _level(level: Level, optimizer: Optimizer, scheduler: Any) -> dict[str, Any]:
    return {
        "parameters": {
            name: [list(p.shape), str(p.dtype), p.requires_grad] for name, p in level.module.named_parameters()
        },
        "optimizer": type(optimizer).__name__,
        "hyperparameters": [
            {key: value for key, value in group.items() if isinstance(value, (int, float, str))}
            for group in optimizer.param_groups
        ],
        **{key: getattr(level, key) for key in ("steps", "warmup", "accumulate", "clip", "precision")},
        "estimator": None if level.estimator is None else str(level.estimator),
        "scheduler": None if scheduler is None else type(scheduler).__name__,
        "batches": _count(level.data),
    }


def _count(data: Any) -> int | None:
    """Return how many batches there are, where the data know: a loader has a length, and may not be able to tell it."""
    try:
        return len(data)
    except TypeError:
        return None


def compare(own: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Hold a problem against that of a checkpoint.

    Raises:
        CheckpointError: levels, parameters or optimisers are others.

    Warns:
        CheckpointWarning: a setting is another one.
    """
    if list(own["levels"]) != list(other["levels"]):
        raise CheckpointError(
            f"the checkpoint is of a problem with the levels {', '.join(other['levels'])}, not {', '.join(own['levels'])}; "
            "give another folder"
        )
    changed = [("lookahead", other["lookahead"], own["lookahead"])]
    for name, level in own["levels"].items():
        there = other["levels"][name]
        _compare_parameters(name, level["parameters"], there["parameters"])
        if level["optimizer"] != there["optimizer"]:
            raise CheckpointError(
                f"level {name!r} is stepped by {there['optimizer']} in the checkpoint, by {level['optimizer']} here; give the "
                "optimizer that it was begun with, or another folder"
            )
        if level["hyperparameters"] != there["hyperparameters"]:
            warnings.warn(
                f"level {name!r}: its optimizer was begun with {there['hyperparameters']}, which stays; it is made with "
                f"{level['hyperparameters']} here",
                CheckpointWarning,
                stacklevel=2,
            )
        changed += [(f"{key} of level {name!r}", there[key], level[key]) for key in _SETTINGS]
    for what, before, now in changed:
        if before != now:
            warnings.warn(
                f"{what} was {before} in the checkpoint, and is {now} from here on", CheckpointWarning, stacklevel=2
            )


def _compare_parameters(name: str, own: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    for parameter in (*own, *other):
        if own.get(parameter) != other.get(parameter):
            here, there = (_shape(side.get(parameter)) for side in (own, other))
            raise CheckpointError(
                f"level {name!r}: parameter {parameter!r} is {there} in the checkpoint, {here} here: it is of another "
                "problem; give another folder"
            )


def _shape(entry: Sequence[Any] | None) -> str:
    return "missing" if entry is None else f"{tuple(entry[0])} of {entry[1]}{'' if entry[2] else ', frozen'}"
