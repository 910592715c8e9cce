"""A comparison of a loss on a whole batch with the pieces of several processes, once for each problem."""

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
from .term import cloned_buffers

__all__ = ["require_mean"]

#: Relative difference that rounding explains.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}


def require_mean(problem: Problem, level: Level, batch: Any) -> None:
    """Compare a loss on the whole batch with the sum of the pieces of all processes, the first time that it is evaluated.

    Both are equal if the loss is a mean over rows, or over as many things as it states. If the loss draws random numbers, that is
    noted, so that the processes draw different ones for their rows; the comparison is then made with modules in evaluation mode.

    Raises:
        ProblemError: they differ, or the processes have other batches.

    Warns:
        TrustWarning: the loss draws random numbers in evaluation mode, too, so the comparison cannot be made.
    """
    ranks, workspace = problem.ranks, problem.workspace
    key = ("rows", level.name)
    if not ranks.several or key in workspace.verified or level.residual is not None:
        return
    workspace.verified.add(key)
    modules = {name: problem[name].module for name in (level.name, *level.loss_references)}
    if level.splits:
        refuse_batch_norm(level, modules.values(), ranks)
    with preserved(problem.devices), cloned_buffers(modules.values()):
        drawing = _compare(problem, level, modules, batch)
        if drawing and level.splits:
            workspace.drawing[level.name] = problem.devices
            for module in modules.values():
                module.eval()  # the modes are restored on exit
            if _compare(problem, level, modules, batch):
                warnings.warn(
                    f"level {level.name!r}: its loss draws random numbers, so it was not compared with the sum over the rows of "
                    f"{ranks.size} processes; make sure that it is a mean over rows, or that it states its count",
                    TrustWarning,
                    stacklevel=2,
                )


def _compare(problem: Problem, level: Level, modules: Mapping[str, nn.Module], batch: Any) -> bool:
    """Compare the whole with the sum of the pieces, unless the loss draws random numbers; return whether it does."""
    devices, ranks = problem.devices, problem.ranks
    before = GeneratorState.capture(devices)

    def evaluate() -> tuple[float, float, bool, float]:
        whole = evaluate_loss(level, modules, batch).total(modules).detach()
        drawing = not GeneratorState.capture(devices).same_as(before)
        before.restore()
        piece = evaluate_loss(level, modules, batch, problem.workspace, ranks=ranks).total(modules).detach()
        before.restore()
        return float(whole), float(piece), drawing, _TOLERANCE.get(whole.dtype, 0.05)

    values = ranks.all_evaluated(evaluate)
    _require_equal(level, [value[:3] for value in values], values[0][3])
    return any(drawing for _, _, drawing, _ in values)


def _require_equal(level: Level, values: Sequence[tuple[float, float, bool]], tolerance: float) -> None:
    """Raise if the values of the whole loss differ between processes, or from the sum of the pieces."""
    (first, _, _), *_ = values
    total = math.fsum(piece for _, piece, _ in values)
    tolerance *= max(abs(first), math.fsum(abs(piece) for _, piece, _ in values))
    if not math.isfinite(total) or not all(math.isfinite(whole) for whole, _, _ in values):
        return  # reported by the step that evaluates it
    for rank, (whole, _, _) in enumerate(values):
        if abs(whole - first) > tolerance:
            raise ProblemError(
                f"level {level.name!r}: on its first batch, the loss is {first:.6g} in process 0 and {whole:.6g} in process "
                f"{rank}: they have other batches; give all processes the same data in the same order, since mlopt splits each "
                "batch over the processes itself"
            )
    if any(drawing for _, _, drawing in values):
        return
    if abs(total - first) > tolerance:
        raise ProblemError(
            f"the loss of level {level.name!r} is {first:.6g} on the whole of its first batch, and {total:.6g} as a mean of the "
            f"losses on the rows of {len(values)} processes: it is not a mean over rows. If it is a mean over something else, "
            'such as masked tokens, return {"loss": loss, "count": their number}. If it is a sum, or rows meet in it '
            "(contrastive losses, statistics of the batch), evaluate it on the whole batch in each process by "
            "Level(split=False)"
        )
