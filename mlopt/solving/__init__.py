"""Solving a problem: the schedule of steps, history, callbacks."""

from .callbacks import Callback, ProgressDisplay
from .history import History
from .run import Run
from .solve import Solution, solve

__all__ = ["Callback", "History", "ProgressDisplay", "Run", "Solution", "solve"]
