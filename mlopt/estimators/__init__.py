"""Estimators: how cotangents are pulled back through a level's solution."""

from ..problem import Estimator, Linearization, Report
from .implicit import Implicit
from .named import MINRES, SAMA, ConjugateGradient, Dense, FiniteDifference, Identity, Neumann, Nystrom
from .unrolled import Unrolled
from .value_function import ValueFunction

__all__ = [
    "MINRES",
    "SAMA",
    "ConjugateGradient",
    "Dense",
    "Estimator",
    "FiniteDifference",
    "Identity",
    "Implicit",
    "Linearization",
    "Neumann",
    "Nystrom",
    "Report",
    "Unrolled",
    "ValueFunction",
]
