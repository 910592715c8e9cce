"""mlopt: gradient-based multi-level optimisation in PyTorch."""

from . import linear
from .errors import (
    EstimatorError,
    MloptError,
    NonFiniteError,
    ProblemError,
    SecondDerivativeError,
)
from .estimators import (
    ConjugateGradient,
    Dense,
    Estimator,
    FiniteDifference,
    Identity,
    Implicit,
    Neumann,
    Unrolled,
    ValueFunction,
)
from .hypergradient import Hypergradient, hypergradient
from .problem import Level, Mixture, Problem, Report, Variables, variables
from .solving import Callback, Solution, solve

__all__ = [
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
    "Unrolled",
    "ValueFunction",
    "Variables",
    "hypergradient",
    "linear",
    "solve",
    "variables",
]
