"""Solve a problem by alternating inner solves and outer steps."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from datetime import timedelta
from functools import partial

import attrs
import torch

from ..errors import ArgumentError, TrustWarning
from ..problem import Problem, Report, require_alike
from ..rng import seed_everything
from ..validation import is_whole, require
from .callbacks import Callback, ProgressDisplay
from .checkpoints import Checkpoints
from .history import History
from .loop import Evaluate, Loop
from .run import Run

__all__ = ["Solution", "solve"]

_require = partial(require, "solve")


@attrs.frozen(eq=False)
class Solution:
    """The result of a run; the modules of the problem hold the solution itself.

    Attributes:
        history: a row for each outer step: `step`, and for each level `level/loss` and the values that its loss logs.
        status: "completed", or the reason why the run ended before: a callback, a signal or the time limit.
        reports: the last report of each level that was pulled back.

    Example:
        >>> from mlopt.testing import quadratic
        >>> solution = mlopt.solve(quadratic("two", mlopt.Identity()).problem, steps=2)
        >>> solution.status, list(solution.reports)
        ('completed', ['y'])
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

    First each level takes its `warmup` steps, the level listed last first. Then each outer step consists of three parts: the
    levels inside the outermost take their `steps`, innermost listed first (and before each of these steps, the levels inside
    them take theirs); one hypergradient of the outermost level is computed; and its optimiser takes one step. The modules hold
    the solution. State carries over from one solve of a level to the next.

    Args:
        problem: the problem; every level needs an optimizer.
        steps: outer steps in total, including those before a resume.
        callbacks: called in this order, see `mlopt.Callback`.
        checkpoint: the folder of the checkpoints, or `mlopt.Checkpoints(folder, every=..., keep=...)`. If it is given, SIGTERM
            and SIGINT end the run after the current step, which is saved, and the process exits with status 0 or 130.
        resume: whether to resume from the newest complete checkpoint in that folder, if there is one. The rest of the run is
            bit-equal to an uninterrupted run.
        seed: seed of the generators of torch, Python and numpy, and of the order of the data of every level. If it is None, the
            generators are used in their current state, and the order of the data is drawn from that of torch.
        lookahead: whether to undo the inner steps once the hypergradient is computed, and to take them again on the same
            batches after the outer step, as DARTS does.
        evaluate: takes the problem and returns named numbers, which are logged as `evaluation/name`. Its random draws do not
            change training. It must restore the train or eval mode of modules itself.
        evaluate_every: outer steps between evaluations.
        log_every: outer steps between calls of `on_log`. The host waits for a device only then, and when the run is saved.
        max_time: seconds, or a timedelta, after which no step is started.
        on_nonfinite: the response to a loss, a gradient or a linear solve that is not finite. "raise" raises an error that names
            the step, and saves the current state beside the checkpoints. "skip" omits this step of this level. "rollback"
            restores variables and optimisers to the start of the outer step; data and random numbers advance. The last two log
            a count. On a GPU, "raise" checks when rows are logged; the others check every step, for which the host waits.
        nonfinite_limit: number of skips or rollbacks after which the next one raises.
        progress: whether to show the progress on standard error, see `mlopt.ProgressDisplay`: a bar on a terminal, otherwise a
            line a minute.

    Returns:
        The history, the status and the last reports.

    Raises:
        ArgumentError: an argument is wrong.
        ProblemError: a level has no optimizer.
        NonFiniteError: a loss, a gradient or a linear solve is not finite.
        CheckpointError: the folder cannot be written, holds checkpoints although `resume` is False, or holds checkpoints of
            another problem or no complete one.
        Interrupted: a signal ended the run, which was saved first; it is a SystemExit.

    Warns:
        TrustWarning: the report of a level was doubtful: at the first step for each kind of remark, and at the end with the
            number of such steps.
        CheckpointWarning: a checkpoint was skipped or could not be written; the message gives the reason.

    Example:
        >>> from mlopt.testing import quadratic
        >>> problem = quadratic("two", mlopt.ConjugateGradient()).problem
        >>> solution = mlopt.solve(problem, steps=5, seed=0, checkpoint=mlopt.Checkpoints("runs/first", every=5))
        >>> solution = mlopt.solve(problem, steps=10, seed=0, checkpoint="runs/first", resume=True)
        >>> solution.history.column("step")[-1]
        10
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
        raise ArgumentError("solve: resume=True without checkpoint; give the folder of the run")
    seconds = _seconds(max_time)
    valid = isinstance(callbacks, Sequence) and all(isinstance(callback, Callback) for callback in callbacks)
    _require("callbacks", callbacks, valid, "a sequence of mlopt.Callback objects")
    ranks = problem.ranks
    data_seed = int(torch.randint(2**62, (), device="cpu")) if seed is None else seed
    if ranks.several:
        # The processes draw the same numbers, also those of the data, except in losses on rows of their own.
        data_seed = ranks.of_first(data_seed)
        require_alike(problem, ranks, "at the start of the run")
    if seed is not None or ranks.several:
        seed_everything(data_seed)
    skip_limit = nonfinite_limit if on_nonfinite == "skip" else 0
    run = Run(problem, steps, data_seed, callbacks, lookahead=lookahead, skip_limit=skip_limit)
    loop = Loop(
        run=run,
        callbacks=[
            callback
            for callback in (*callbacks, *([ProgressDisplay()] if progress else ()))
            if ranks.first or callback.in_every_process
        ],
        checkpoints=Checkpoints(checkpoint) if isinstance(checkpoint, (str, os.PathLike)) else checkpoint,
        evaluate=evaluate,
        evaluate_every=evaluate_every,
        log_every=log_every,
        max_seconds=seconds,
        on_nonfinite=on_nonfinite,
        nonfinite_limit=nonfinite_limit,
    )
    status = loop.execute(resume, seed)
    for name, (count, remarks) in run.engine.gradients.doubts.items():
        warnings.warn(
            f"level {name!r}, doubtful in {count} steps, most recently: {remarks}", TrustWarning, stacklevel=2
        )
    return Solution(history=run.history, status=status, reports=run.engine.gradients.reports)


def _seconds(limit: float | timedelta | None) -> float | None:
    seconds = limit.total_seconds() if isinstance(limit, timedelta) else limit
    valid = seconds is None or (isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and seconds > 0)
    _require("max_time", limit, valid, "a number of seconds > 0, a timedelta > 0, or None")
    return seconds
