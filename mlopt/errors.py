"""The errors that mlopt raises on purpose, each a sentence that says what was met and how to mend it, and its warnings."""

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
    """Base of every error that mlopt raises on purpose."""


class ArgumentError(MloptError, ValueError):
    """An argument has a type or a value that it may not have."""


class MissingDependencyError(MloptError, ModuleNotFoundError):
    """An optional dependency is not installed; the message says how to install it."""


class ProblemError(MloptError, ValueError):
    """A level, or the graph that the levels form, is not a well-posed problem."""


class EstimatorError(MloptError, ValueError):
    """An estimator cannot do what was asked of it on this problem."""


class SecondDerivativeError(EstimatorError):
    """A kernel inside a loss has no second derivative."""


class NonFiniteError(MloptError, ArithmeticError):
    """A loss, a gradient or a linear solve holds NaN or infinity.

    Attributes:
        step: the outer step of `solve` in which it came, where one is under way.
    """

    def __init__(self, sentence: str, *, step: int | None = None) -> None:
        super().__init__(sentence)
        self.step = step


class Interrupted(SystemExit):
    """A signal ended a run, which is saved: SIGTERM exits with 0, SIGINT with 130."""


class CheckpointError(MloptError, RuntimeError):
    """A run's state cannot be written, or what was written cannot be read back whole."""


class TrustWarning(UserWarning):
    """A hypergradient should not be trusted: the report of a level says why."""


class CheckpointWarning(UserWarning):
    """A checkpoint that is not whole was passed over, or one that is no longer needed could not be removed."""
