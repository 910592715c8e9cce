"""A description of a problem, saved in its checkpoints, and its comparison with the problem of a run that resumes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from ..errors import CheckpointError, CheckpointWarning
from ..problem import Level, Problem

__all__ = ["describe", "require_compatible"]

#: Entries of a level that may change when a run resumes, with a warning.
_SETTINGS = ("estimator", "response", "scheduler", "steps", "warmup", "accumulate", "clip", "precision", "batches")


def describe(
    problem: Problem, optimizers: Mapping[str, Optimizer], schedulers: Mapping[str, Any], *, lookahead: bool
) -> dict[str, Any]:
    """Return the levels of a problem with their parameters, optimisers and settings, as plain values."""
    levels = {
        level.name: _describe_level(level, optimizers.get(level.name), schedulers.get(level.name)) for level in problem
    }
    return {"levels": levels, "lookahead": lookahead}


def _describe_level(level: Level, optimizer: Optimizer | None, scheduler: Any) -> dict[str, Any]:
    return {
        "parameters": {
            name: [list(p.shape), str(p.dtype), p.requires_grad] for name, p in level.module.named_parameters()
        },
        "optimizer": "a solver of its own" if optimizer is None else type(optimizer).__name__,
        "hyperparameters": [
            {key: value for key, value in group.items() if isinstance(value, (int, float, str))}
            for group in ([] if optimizer is None else optimizer.param_groups)
        ],
        **{key: getattr(level, key) for key in ("steps", "warmup", "accumulate", "clip", "precision")},
        "estimator": None if level.estimator is None else str(level.estimator),
        "response": None if level.response is None else str(level.response),
        "scheduler": None if scheduler is None else type(scheduler).__name__,
        "batches": _length(level.data),
    }


def _length(data: Any) -> int | None:
    """Return the number of batches; None if it is unknown: the `__len__` of a loader may raise."""
    try:
        return len(data)
    except TypeError:
        return None


def require_compatible(own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Compare the description of a problem with the description in a checkpoint.

    Raises:
        CheckpointError: they differ in levels, parameters or optimisers.

    Warns:
        CheckpointWarning: they differ in a setting.
    """
    if list(own["levels"]) != list(saved["levels"]):
        raise CheckpointError(
            f"the checkpoint belongs to a problem with the levels {', '.join(saved['levels'])}, not {', '.join(own['levels'])}; "
            "give another folder"
        )
    settings = [("lookahead", saved["lookahead"], own["lookahead"])]
    for name, level in own["levels"].items():
        before = saved["levels"][name]
        _compare_parameters(name, level["parameters"], before["parameters"])
        if level["optimizer"] != before["optimizer"]:
            raise CheckpointError(
                f"the optimizer of level {name!r} is {before['optimizer']} in the checkpoint and {level['optimizer']} in the "
                "problem; give the optimizer of the checkpoint, or another folder"
            )
        if level["hyperparameters"] != before["hyperparameters"]:
            warnings.warn(
                f"level {name!r}: the optimizer keeps the hyperparameters of the checkpoint, {before['hyperparameters']}; those "
                f"of the problem, {level['hyperparameters']}, are ignored",
                CheckpointWarning,
                stacklevel=2,
            )
        settings += [(f"{key} of level {name!r}", before[key], level[key]) for key in _SETTINGS]
    for setting, old, new in settings:
        if old != new:
            warnings.warn(
                f"{setting} was {old} in the checkpoint, and is {new} from this step on",
                CheckpointWarning,
                stacklevel=2,
            )


def _compare_parameters(name: str, own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    for parameter in (*own, *saved):
        if own.get(parameter) != saved.get(parameter):
            new, old = (_shape(side.get(parameter)) for side in (own, saved))
            raise CheckpointError(
                f"level {name!r}: parameter {parameter!r} is {old} in the checkpoint and {new} in the problem; give another "
                "folder"
            )


def _shape(entry: Sequence[Any] | None) -> str:
    return "missing" if entry is None else f"{tuple(entry[0])} of {entry[1]}{'' if entry[2] else ', frozen'}"
