"""mlopt: gradient-based multi-level optimisation in PyTorch."""

from . import linear
from .diagnosis import Diagnosis, DisagreementError, check_hypergradient, diagnose
from .errors import (
    EstimatorError,
    MloptError,
    NonFiniteError,
    ProblemError,
    SecondDerivativeError,
    TrustWarning,
)
from .estimators import (
    MINRES,
    SAMA,
    ConjugateGradient,
    Dense,
    Estimator,
    FiniteDifference,
    Identity,
    Implicit,
    Neumann,
    Nystrom,
    Unrolled,
    ValueFunction,
)
from .hypergradient import Hypergradient, hypergradient
from .problem import Level, Mixture, Problem, Report, Variables, variables
from .solving import Callback, Solution, solve

__all__ = [
    "MINRES",
    "SAMA",
    "Callback",
    "ConjugateGradient",
    "Dense",
    "Diagnosis",
    "DisagreementError",
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
    "Nystrom",
    "Problem",
    "ProblemError",
    "Report",
    "SecondDerivativeError",
    "Solution",
    "TrustWarning",
    "Unrolled",
    "ValueFunction",
    "Variables",
    "check_hypergradient",
    "diagnose",
    "hypergradient",
    "linear",
    "solve",
    "variables",
]
