"""A comparison of a loss on a whole batch with the pieces of several processes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ProblemError, TrustWarning
from ..rng import GeneratorState, preserved
from .level import Level
from .losses import evaluate_loss
from .problem import Problem
from .processes import refuse_batch_norm
from .stand_ins import cloned_buffers

__all__ = ["require_mean"]

#: Relative difference that rounding explains.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
_DRAWING = "its loss draws random numbers"


def require_mean(problem: Problem, level: Level, batch: Any) -> None:
    """Compare a loss on a whole batch with the sum of the pieces of all processes, the 1st, 2nd, 4th, 8th time and so on.

    Both are equal if the loss is a mean over rows, or over as many things as it states; that may show in some batches only. If
    the loss draws random numbers, that is noted, so that the processes draw different ones for their rows; the comparison is then
    made with modules in evaluation mode.

    Raises:
        ProblemError: they differ, or the processes have other batches.

    Warns:
        TrustWarning: the comparison cannot be made: the loss draws random numbers in evaluation mode, too, or the whole batch
            does not fit into memory.
    """
    ranks, workspace = problem.ranks, problem.workspace
    if not ranks.several or level.residual is not None:
        return
    key = ("rows", level.name)
    workspace.uses[key] = count = workspace.uses.get(key, 0) + 1
    if count & (count - 1):
        return
    modules = {name: problem[name].module for name in (level.name, *level.loss_references)}
    if level.splits:
        refuse_batch_norm(level, modules.values(), ranks)
    with preserved(problem.devices), cloned_buffers(modules.values()):
        obstacle = _compare(problem, level, modules, batch)
        if obstacle == _DRAWING and level.splits:
            workspace.drawing[level.name] = problem.devices
            for module in modules.values():
                module.eval()  # the modes are restored on exit
            obstacle = _compare(problem, level, modules, batch)
    if obstacle and level.splits and key not in workspace.verified:
        workspace.verified.add(key)
        warnings.warn(
            f"level {level.name!r}: {obstacle}, so its loss was not compared with the sum over the rows of {ranks.size} "
            "processes; make sure that it is a mean over rows, or that it states its count",
            TrustWarning,
            stacklevel=2,
        )


def _compare(problem: Problem, level: Level, modules: Mapping[str, nn.Module], batch: Any) -> str:
    """Compare the whole with the sum of the pieces; return what prevents that, or ""."""
    devices, ranks = problem.devices, problem.ranks
    before = GeneratorState.capture(devices)

    def whole() -> tuple[float, str, float]:
        try:
            value = evaluate_loss(level, modules, batch).total(modules).detach()
        except torch.OutOfMemoryError:
            return math.nan, "its whole batch does not fit into the memory of one device", 0.0
        drawing = not GeneratorState.capture(devices).same_as(before)
        before.restore()
        return float(value), _DRAWING if drawing else "", _TOLERANCE.get(value.dtype, 0.05)

    def piece() -> float:
        value = evaluate_loss(level, modules, batch, problem.workspace, ranks=ranks).total(modules).detach()
        before.restore()
        return float(value)

    wholes = ranks.all_evaluated(whole)
    pieces = ranks.all_evaluated(piece)
    obstacle = next((obstacle for _, obstacle, _ in wholes if obstacle), "")
    _require_equal(level, [value for value, _, _ in wholes], [] if obstacle else pieces, max(t for *_, t in wholes))
    return obstacle


def _require_equal(level: Level, wholes: Sequence[float], pieces: Sequence[float], tolerance: float) -> None:
    """Raise if the values of the whole loss differ between processes, or from the sum of the pieces, if there are any."""
    first, *_ = wholes
    total = math.fsum(pieces) if all(map(math.isfinite, pieces)) else math.nan
    if not all(map(math.isfinite, (*wholes, total))):
        return  # reported by the step that evaluates it
    tolerance *= max(abs(first), *map(abs, pieces), math.fsum(map(abs, pieces)))
    for rank, whole in enumerate(wholes):
        if abs(whole - first) > tolerance:
            raise ProblemError(
                f"level {level.name!r}: on one batch, the loss is {first:.6g} in process 0 and {whole:.6g} in process {rank}: "
                "their batches differ; give all processes the same data in the same order, since mlopt splits each batch over "
                "the processes itself"
            )
    if pieces and abs(total - first) > tolerance:
        raise ProblemError(
            f"the loss of level {level.name!r} is {first:.6g} on a whole batch, and {total:.6g} as a mean of the losses on the "
            f"rows of {len(wholes)} processes: it is not a mean over rows. If it is a mean over something else, such as masked "
            'tokens, return {"loss": loss, "count": their number}. If it is a sum, or combines rows (contrastive losses, '
            "statistics of the batch), evaluate it on the whole batch in each process with Level(split=False)"
        )
