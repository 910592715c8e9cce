"""Estimators: rules that pull cotangents back through a level's solution."""

from ..problem import Estimator, Linearization, Report
from .condition import Condition
from .identity import FiniteDifference, Identity
from .implicit import Implicit
from .kfac import KFACPreconditioner
from .named import (
    GMRES,
    MINRES,
    ConjugateGradient,
    Dense,
    LinearSolve,
    Neumann,
    Nystrom,
)
from .sama import SAMA
from .unrolled import Unrolled
from .value_function import ValueFunction

__all__ = [
    "GMRES",
    "MINRES",
    "SAMA",
    "Condition",
    "ConjugateGradient",
    "Dense",
    "Estimator",
    "FiniteDifference",
    "Identity",
    "Implicit",
    "KFACPreconditioner",
    "LinearSolve",
    "Linearization",
    "Neumann",
    "Nystrom",
    "Report",
    "Unrolled",
    "ValueFunction",
]
