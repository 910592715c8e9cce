"""Solvers of (A + damping I) x = b that know vectors and products with A, and nothing else."""

from .conjugate_gradient import ConjugateGradient
from .dense import Dense
from .identity import Identity
from .neumann import Neumann
from .solver import LinearSolution, LinearSolver, MatVec

__all__ = ["ConjugateGradient", "Dense", "Identity", "LinearSolution", "LinearSolver", "MatVec", "Neumann"]
