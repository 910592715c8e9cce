"""A run in progress."""

from __future__ import annotations

from ..problem import Problem
from .engine import Engine
from .history import History

__all__ = ["Run"]


class Run:
    """A run in progress, as callbacks see it.

    Attributes:
        problem: the problem.
        steps: outer steps asked for.
        step: outer steps taken.
        history: a row for each step taken.
        engine: optimisers, schedulers and data streams of the levels.
    """

    def __init__(self, problem: Problem, steps: int, seed: int) -> None:
        self.problem, self.steps, self.step = problem, steps, 0
        self.history = History()
        self.engine = Engine(problem, seed)
        self.status: str | None = None

    def stop(self, reason: str) -> None:
        """End the run after the present step; the reason becomes the status."""
        self.status = reason
