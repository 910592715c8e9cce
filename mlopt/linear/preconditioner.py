"""The base of the preconditioners: approximate inverses, symmetric and positive definite, cheap to apply."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ..tensors import Tensors
from .solver import MatVec, SolveCost

__all__ = ["Preconditioner"]


class Preconditioner(ABC):
    """A rule that finds P^-1 ~ (A + damping I)^-1, up to a factor, for a symmetric A that is known by its products only.

    Example:
        >>> class Scaling(mlopt.linear.Preconditioner):
        ...     def prepare(self, matvec, like, damping):
        ...         return lambda vector: (0.5 * vector[0],), 0
        >>> solver = mlopt.linear.ConjugateGradient(preconditioner=Scaling())
        >>> solver.solve(lambda v: (2.0 * v[0],), (torch.ones(2),)).iterations
        1
    """

    def cost(self, unknowns: int) -> SolveCost | None:
        """Return the vectors that a preconditioner holds and the products that it takes; None if it does not know."""
        return None

    @abstractmethod
    def prepare(self, matvec: MatVec, like: Tensors, damping: float) -> tuple[MatVec, int]:
        """Return v -> P^-1 v, and the number of products spent on it.

        The function returned leaves v unchanged, and its P^-1 is symmetric and positive definite.

        Args:
            matvec: takes v and returns (A + damping I) v.
            like: a vector, for its shapes, dtypes and devices.
            damping: the damping that `matvec` includes.
        """
