"""Solving a problem: the schedule of steps, history, callbacks."""

from .callbacks import Callback, ProgressDisplay
from .history import History
from .solve import Run, Solution, solve

__all__ = ["Callback", "History", "ProgressDisplay", "Run", "Solution", "solve"]
