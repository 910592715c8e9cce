"""Solvers of (A + damping I) x = b that know vectors and products with A, and nothing else."""

from .assumed_inverse import AssumedInverse, Diagonal, Identity
from .conjugate_gradient import ConjugateGradient
from .dense import Dense
from .gmres import GMRES
from .history import History
from .kronecker import Kronecker
from .minres import MINRES
from .neumann import Neumann
from .nystrom import Nystrom, NystromPreconditioner
from .preconditioner import Preconditioner
from .solver import LinearSolution, LinearSolver, Matrix, MatVec, SolveCost

__all__ = [
    "GMRES",
    "MINRES",
    "AssumedInverse",
    "ConjugateGradient",
    "Dense",
    "Diagonal",
    "History",
    "Identity",
    "Kronecker",
    "LinearSolution",
    "LinearSolver",
    "MatVec",
    "Matrix",
    "Neumann",
    "Nystrom",
    "NystromPreconditioner",
    "Preconditioner",
    "SolveCost",
]
