"""What a preconditioner is: an approximate inverse, symmetric and positive definite, cheap to apply."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ..tensors import Tensors
from .solver import MatVec

__all__ = ["Preconditioner"]


class Preconditioner(ABC):
    """A rule that finds P^-1 ~ (A + damping I)^-1, up to a factor, for a symmetric A that is known by its products only."""

    @abstractmethod
    def prepare(self, matvec: MatVec, like: Tensors, damping: float) -> tuple[MatVec, int]:
        """Return v -> P^-1 v, and the products that finding it took.

        What is returned leaves v as it is, and gives a symmetric positive definite P^-1.

        Args:
            matvec: takes v and returns (A + damping I) v.
            like: a vector, for its shapes, dtypes and devices.
            damping: the damping that `matvec` has in it.
        """
