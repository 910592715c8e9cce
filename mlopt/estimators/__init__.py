"""Estimators: how cotangents are pulled back through a level's solution."""

from ..problem import Estimator, Linearization, Report
from .implicit import Implicit
from .named import SAMA, ConjugateGradient, Dense, FiniteDifference, Identity, Neumann

__all__ = [
    "SAMA",
    "ConjugateGradient",
    "Dense",
    "Estimator",
    "FiniteDifference",
    "Identity",
    "Implicit",
    "Linearization",
    "Neumann",
    "Report",
]
