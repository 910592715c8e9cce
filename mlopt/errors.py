"""Errors and warnings. Each message names the cause and the remedy."""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "CheckpointWarning",
    "EstimatorError",
    "Interrupted",
    "MissingDependencyError",
    "MloptError",
    "NonFiniteError",
    "ProblemError",
    "SecondDerivativeError",
    "TrustWarning",
]


class MloptError(Exception):
    """Base class of every error that mlopt raises on purpose."""


class ArgumentError(MloptError, ValueError):
    """An argument has a wrong type or value."""


class MissingDependencyError(MloptError, ModuleNotFoundError):
    """An optional dependency is not installed; the message says how to install it."""


class ProblemError(MloptError, ValueError):
    """A level, or the graph of the levels, is not well-posed."""


class EstimatorError(MloptError, ValueError):
    """An estimator cannot be used on this problem."""


class SecondDerivativeError(EstimatorError):
    """A kernel in a loss has no second derivative."""


class NonFiniteError(MloptError, ArithmeticError):
    """A loss, a gradient or a linear solve contains NaN or infinity.

    Attributes:
        step: the outer step of `solve` in which it occurred; None if it is not known.
    """

    def __init__(self, message: str, *, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step


class Interrupted(SystemExit):
    """A signal ended a run, which was saved first. The exit status is 0 after SIGTERM and 130 after SIGINT."""


class CheckpointError(MloptError, RuntimeError):
    """The state of a run cannot be written or read."""


class TrustWarning(UserWarning):
    """A hypergradient should not be trusted; the message gives the reason."""


class CheckpointWarning(UserWarning):
    """A checkpoint was skipped, or could not be written or removed, or differs from the run that resumes from it."""
