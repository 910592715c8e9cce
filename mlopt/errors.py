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
    "ProcessError",
    "SecondDerivativeError",
    "TrustWarning",
]


class MloptError(Exception):
    """Base class of all errors that mlopt raises on purpose.

    Example:
        >>> try:
        ...     mlopt.Problem()
        ... except mlopt.MloptError as error:
        ...     print(error)
        Problem: it has no level; give at least one
    """


class ArgumentError(MloptError, ValueError):
    """An argument has a wrong type or value.

    Example:
        >>> mlopt.Checkpoints("runs/first", every=0)
        Traceback (most recent call last):
        ...
        mlopt.errors.ArgumentError: Checkpoints: every=0; it must be a whole number >= 1
    """


class MissingDependencyError(MloptError, ModuleNotFoundError):
    """An optional dependency is not installed; the message says how to install it.

    Example:
        >>> from mlopt.imports import import_optional
        >>> import_optional("not_installed", "This example", "not-installed")
        Traceback (most recent call last):
        ...
        mlopt.errors.MissingDependencyError: This example needs not_installed, which is not installed: pip install not-installed
    """


class ProblemError(MloptError, ValueError):
    """A level, or the graph of the levels, is not well-posed.

    Example:
        >>> mlopt.Problem()
        Traceback (most recent call last):
        ...
        mlopt.errors.ProblemError: Problem: it has no level; give at least one
    """


class EstimatorError(MloptError, ValueError):
    """An estimator cannot be used on this problem.

    Example:
        >>> from mlopt.testing import quadratic
        >>> mlopt.hypergradient(quadratic("two", mlopt.Dense(limit=1)).problem)
        Traceback (most recent call last):
        ...
        mlopt.errors.EstimatorError: Dense: the level has 5 unknowns and limit=1; use ConjugateGradient, or raise the limit
    """


class SecondDerivativeError(EstimatorError):
    """A kernel in a loss has no second derivative.

    Example:
        >>> def inner_loss(y, batch, *, x):
        ...     return x() * torch.cdist(y(), torch.zeros(1, 2)).square().sum()
        >>> problem = mlopt.Problem(
        ...     mlopt.Level("x", mlopt.variables(torch.ones(())), lambda x, batch, *, y: y().sum()),
        ...     mlopt.Level("y", mlopt.variables(torch.ones(3, 2)), inner_loss, estimator=mlopt.ConjugateGradient()),
        ... )
        >>> mlopt.hypergradient(problem)
        Traceback (most recent call last):
        ...
        mlopt.errors.SecondDerivativeError: a kernel in the loss has no second derivative (...
    """


class NonFiniteError(MloptError, ArithmeticError):
    """A loss, a gradient or a linear solve contains NaN or infinity.

    Attributes:
        step: the outer step of `solve` in which it occurred; None if it is not known.

    Example:
        >>> from mlopt.testing import quadratic
        >>> problem = quadratic("two", mlopt.Identity()).problem
        >>> _ = problem["y"].parameters[0].data.fill_(torch.nan)
        >>> mlopt.solve(problem, steps=1)
        Traceback (most recent call last):
        ...
        mlopt.errors.NonFiniteError: outer step 1: the loss of level 'y' is nan (estimators: y: Identity() ...)
    """

    def __init__(self, message: str, *, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step


class Interrupted(SystemExit):
    """A signal ended a run after the run was saved. The exit status is 0 after SIGTERM and 130 after SIGINT.

    Example:
        >>> issubclass(mlopt.Interrupted, Exception)  # so `except Exception` does not catch it
        False
    """


class CheckpointError(MloptError, RuntimeError):
    """The state of a run cannot be written or read.

    Example:
        >>> from mlopt.testing import quadratic
        >>> problem = quadratic("two", mlopt.Identity()).problem
        >>> solution = mlopt.solve(problem, steps=1, checkpoint="runs/first")
        >>> solution = mlopt.solve(problem, steps=2, checkpoint="runs/first")
        Traceback (most recent call last):
        ...
        mlopt.errors.CheckpointError: runs/first already holds checkpoints, the newest step-00000001: resume from it with ...
    """


class ProcessError(MloptError, RuntimeError):
    """Another process of the run failed or ended, so this process stops too. The error of that process states the cause.

    Example:
        >>> issubclass(mlopt.ProcessError, mlopt.MloptError)
        True
    """


class TrustWarning(UserWarning):
    """A hypergradient should not be trusted; the message gives the reason.

    Example:
        >>> import warnings
        >>> from mlopt.testing import quadratic
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", mlopt.TrustWarning)  # raise instead of warning
        ...     hypergradient = mlopt.hypergradient(quadratic("two", mlopt.ConjugateGradient()).problem)
    """


class CheckpointWarning(UserWarning):
    """A checkpoint was skipped, could not be written or removed, or differs from the run that resumes from it.

    Example:
        >>> import warnings
        >>> from mlopt.testing import quadratic
        >>> problem = quadratic("two", mlopt.Identity()).problem
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", mlopt.CheckpointWarning)  # end the run if a checkpoint cannot be written
        ...     solution = mlopt.solve(problem, steps=1, checkpoint="runs/second")
    """
