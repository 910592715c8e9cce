"""Solve a problem: alternate inner solves and outer steps."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from datetime import timedelta

import attrs
import torch

from ..errors import ProblemError, TrustWarning
from ..problem import Problem, Report
from ..rng import seed_everything
from ..validation import is_whole
from .callbacks import Callback, ProgressDisplay
from .checkpoints import Checkpoints
from .history import History
from .loop import Evaluate, Loop
from .run import Run

__all__ = ["Solution", "solve"]


@attrs.frozen(eq=False)
class Solution:
    """What a run ended with.

    Attributes:
        history: a row for each outer step: `step`, and `level/loss` and whatever the losses log for each level.
        status: why it ended: "completed", what the callback that stopped it said, or that the time was up.
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
    checkpoint: Checkpoints | str | os.PathLike[str] | None = None,
    resume: bool = False,
    seed: int | None = None,
    lookahead: bool = False,
    evaluate: Evaluate | None = None,
    evaluate_every: int = 1,
    log_every: int = 10,
    max_time: float | timedelta | None = None,
    on_nonfinite: str = "raise",
    nonfinite_limit: int = 10,
    progress: bool = True,
) -> Solution:
    """Solve a problem by alternating gradient steps.

    First each level takes its `warmup` steps, those listed last first. Then one outer step is: each level solved inside the
    outermost takes its `steps`, innermost listed first, before each of them the levels inside it; then one hypergradient of the
    outermost level, and one step of its optimiser on it. The modules hold the solution; state carries over from one solve of a
    level to the next.

    Args:
        problem: the problem; every level needs an optimizer.
        steps: outer steps, those before a resume included.
        callbacks: called in order, see `mlopt.Callback`.
        checkpoint: a folder that the run is saved in, or `mlopt.Checkpoints(folder, every=..., keep=...)`. With it, SIGTERM and
            SIGINT end the run after the present step, saved; the process exits with 0 or 130.
        resume: whether to go on from the newest valid checkpoint in that folder, if there is any. What follows is bit-equal to
            the run that was not interrupted.
        seed: seeds torch, Python and numpy, and the order of every level's data. When None, the generators are taken as
            they stand, and the data's order is drawn from torch's.
        lookahead: whether the inner steps before an outer step are taken back once its hypergradient is formed, and taken again
            after it, on the same batches, with the outer variables moved. The first ones then only look ahead, as in DARTS.
        evaluate: takes the problem and returns named numbers, logged as `evaluation/name`. Random numbers that it draws are not
            training's; the mode of modules is its own business.
        evaluate_every: outer steps between evaluations.
        log_every: outer steps between calls of `on_log`. Only then, and at saves, does the host wait for a device.
        max_time: seconds, or a timedelta, after which no step is begun.
        on_nonfinite: what a loss, gradient or linear solve that is not finite does. "raise": an error that says where, the state
            saved beside the checkpoints. "skip": that step of that level is left out. "rollback": variables and optimisers
            go back to the start of the outer step; data and random numbers go on. Either way the row says so. On a GPU, "raise"
            looks when rows are logged; the others look at every step, for which the host waits.
        nonfinite_limit: how many are left out or taken back before they raise after all.
        progress: whether to show a progress bar, where there is a terminal.

    Returns:
        The history, why the run ended, and the last reports.

    Raises:
        ProblemError: an argument is not what it must be, or a level has no optimizer.
        NonFiniteError: a loss, a gradient or a linear solve is not finite.
        CheckpointError: the folder cannot be written, holds checkpoints that are not asked for, of another problem, or none that
            is valid.
        Interrupted: a signal ended the run, which is saved; it is a SystemExit.

    Warns:
        TrustWarning: reports of some steps had a remark, and their solves did not converge.
        CheckpointWarning: a checkpoint was passed over, or could not be written, and why.

    Example:
        >>> solution = mlopt.solve(problem, steps=1_000, seed=0, checkpoint="runs/first", resume=True)
        >>> solution.history.column("classifier/loss")[-1]
    """
    _require("problem", problem, isinstance(problem, Problem), "an mlopt.Problem")
    least = {"steps": 0, "evaluate_every": 1, "log_every": 1, "nonfinite_limit": 1}
    for name, value in zip(least, (steps, evaluate_every, log_every, nonfinite_limit), strict=True):
        _require(name, value, is_whole(value, least[name]), f"a whole number >= {least[name]}")
    for name, value in {"resume": resume, "lookahead": lookahead, "progress": progress}.items():
        _require(name, value, isinstance(value, bool), "True or False")
    _require("seed", seed, seed is None or is_whole(seed), "a whole number, or None")
    _require(
        "on_nonfinite", on_nonfinite, on_nonfinite in ("raise", "skip", "rollback"), "'raise', 'skip' or 'rollback'"
    )
    _require("evaluate", evaluate, evaluate is None or callable(evaluate), "a function of the problem, or None")
    folders = (str, os.PathLike, Checkpoints, type(None))
    _require("checkpoint", checkpoint, isinstance(checkpoint, folders), "a folder, an mlopt.Checkpoints, or None")
    if resume and checkpoint is None:
        raise ProblemError("solve: resume=True without checkpoint; give the folder that the run was saved in")
    seconds = _seconds(max_time)
    watching = isinstance(callbacks, Sequence) and all(isinstance(callback, Callback) for callback in callbacks)
    _require("callbacks", callbacks, watching, "a sequence of mlopt.Callback objects")
    if seed is not None:
        seed_everything(seed)
    chosen = int(torch.randint(2**62, ())) if seed is None else seed
    skips = nonfinite_limit if on_nonfinite == "skip" else 0
    run = Run(problem, steps, chosen, callbacks, lookahead=lookahead, skips=skips)
    loop = Loop(
        run=run,
        watchers=(*callbacks, ProgressDisplay()) if progress else tuple(callbacks),
        checkpoints=Checkpoints(checkpoint) if isinstance(checkpoint, (str, os.PathLike)) else checkpoint,
        evaluate=evaluate,
        evaluate_every=evaluate_every,
        log_every=log_every,
        seconds=seconds,
        on_nonfinite=on_nonfinite,
        limit=nonfinite_limit,
    )
    status = loop.go(resume, seed)
    for name, (count, remarks) in run.engine.gradients.doubts.items():
        warnings.warn(f"level {name!r}, in {count} steps, at last: {remarks}", TrustWarning, stacklevel=2)
    return Solution(history=run.history, status=status, reports=run.engine.gradients.reports)


def _require(name: str, value: object, good: bool, what: str) -> None:
    if not good:
        raise ProblemError(f"solve: {name}={value!r}; it must be {what}")


def _seconds(limit: float | timedelta | None) -> float | None:
    seconds = limit.total_seconds() if isinstance(limit, timedelta) else limit
    good = seconds is None or (isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and seconds > 0)
    _require("max_time", limit, good, "a number of seconds > 0, such a timedelta, or None")
    return seconds
