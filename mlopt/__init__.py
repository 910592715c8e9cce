"""mlopt: gradient-based multi-level optimisation in PyTorch."""

from . import linear
from .errors import (
    EstimatorError,
    MloptError,
    NonFiniteError,
    ProblemError,
    SecondDerivativeError,
)
from .estimators import SAMA, ConjugateGradient, Dense, Estimator, FiniteDifference, Identity, Implicit, Neumann
from .hypergradient import Hypergradient, hypergradient
from .problem import Level, Mixture, Problem, Report, Variables, variables
from .solving import Callback, Solution, solve

__all__ = [
    "SAMA",
    "Callback",
    "ConjugateGradient",
    "Dense",
    "Estimator",
    "EstimatorError",
    "FiniteDifference",
    "Hypergradient",
    "Identity",
    "Implicit",
    "Level",
    "Mixture",
    "MloptError",
    "Neumann",
    "NonFiniteError",
    "Problem",
    "ProblemError",
    "Report",
    "SecondDerivativeError",
    "Solution",
    "Variables",
    "hypergradient",
    "linear",
    "solve",
    "variables",
]
