"""Solve a problem: alternate inner solves and outer steps."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import attrs
import torch

from ..errors import ProblemError, TrustWarning
from ..generators import seed_everything
from ..problem import Problem, Report
from .callbacks import Callback, ProgressDisplay
from .history import History
from .run import Run

__all__ = ["Solution", "solve"]


@attrs.frozen(eq=False)
class Solution:
    """What a run ended with.

    Attributes:
        history: a row for each outer step: `step`, and `level/loss` and whatever the losses log for each level.
        status: why it ended: "completed", or what the callback that stopped it said.
        reports: the last report of each level that was pulled back.
    """

    history: History
    status: str
    reports: dict[str, Report]


def solve(
    problem: Problem,
    steps: int,
    *,
    callbacks: Sequence[Callback] = (),
    seed: int | None = None,
    progress: bool = True,
) -> Solution:
    """Solve a problem by alternating gradient steps.

    One outer step is: each level solved inside the outermost takes its `steps`, innermost listed first, before each of
    them the levels inside it; then one hypergradient of the outermost level, and one step of its optimiser on it. The modules
    hold the solution; state carries over from one solve of a level to the next.

    Args:
        problem: the problem; every level needs an optimizer.
        steps: outer steps.
        callbacks: called in order, see `mlopt.Callback`.
        seed: seeds torch, Python and numpy, and the order of every level's data. When None, the generators are taken as
            they stand, and the data's order is drawn from torch's.
        progress: whether to show a progress bar, where there is a terminal.

    Returns:
        The history, why the run ended, and the last reports.

    Raises:
        ProblemError: `steps` is no whole number, or a level has no optimizer.
        NonFiniteError: a loss, a gradient or a linear solve is not finite.

    Warns:
        TrustWarning: reports of some steps had a remark, and their solves did not converge.

    Example:
        >>> solution = mlopt.solve(problem, steps=1_000, seed=0)
        >>> solution.history.column("classifier/loss")[-1]
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ProblemError(f"solve: steps={steps!r}; it must be a whole number >= 0")
    if seed is not None:
        seed_everything(seed)
    run = Run(problem, steps, int(torch.randint(2**62, ())) if seed is None else seed)
    watchers = (*callbacks, ProgressDisplay()) if progress else tuple(callbacks)
    for callback in watchers:
        callback.on_train_begin(run)
    try:
        while run.step < steps and run.status is None:
            run.engine.logs = {}
            run.engine.step(problem.outermost)
            run.step += 1
            run.history.append({"step": run.step, **run.engine.logs})
            for callback in watchers:
                callback.on_step_end(run)
    finally:
        for callback in watchers:
            callback.on_train_end(run)
    for name, (count, remarks) in run.engine.doubts.items():
        warnings.warn(f"level {name!r}, in {count} steps, at last: {remarks}", TrustWarning, stacklevel=2)
    return Solution(history=run.history, status=run.status or "completed", reports=run.engine.reports)
