"""Estimators: how cotangents are pulled back through a level's solution."""

from ..problem import Estimator, Linearization, Report
from .implicit import Implicit
from .named import ConjugateGradient, Dense, FiniteDifference, Identity, Neumann
from .unrolled import Unrolled
from .value_function import ValueFunction

__all__ = [
    "ConjugateGradient",
    "Dense",
    "Estimator",
    "FiniteDifference",
    "Identity",
    "Implicit",
    "Linearization",
    "Neumann",
    "Report",
    "Unrolled",
    "ValueFunction",
]
