"""A Kronecker product plus a multiple of the identity, inverted by the eigendecompositions of its factors."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

__all__ = ["Kronecker"]


@attrs.frozen(eq=False)
class Kronecker:
    """The operator X -> G X A on matrices X (m, n), with positive semi-definite factors A and G by their eigendecompositions.

    Args:
        right: the eigenvalues of A (n,).
        right_basis: its eigenvectors (n, n); None for a diagonal A.
        left: the eigenvalues of G (m,).
        left_basis: its eigenvectors (m, m).

    Example:
        >>> product = mlopt.linear.Kronecker.of(torch.tensor([1.0, 3.0]), 2.0 * torch.eye(1))
        >>> product.solve(torch.ones(1, 2), torch.tensor(2.0))
        tensor([[0.2500, 0.1250]])
    """

    right: Tensor
    right_basis: Tensor | None
    left: Tensor
    left_basis: Tensor

    @classmethod
    def of(cls, right: Tensor, left: Tensor) -> Kronecker:
        """Return the operator with these factors: A (n, n), or its diagonal (n,), and G (m, m)."""
        dtype = torch.promote_types(right.dtype, left.dtype)
        right, left = right.to(dtype), left.to(dtype)
        left_values, left_basis = torch.linalg.eigh(left)
        values, basis = (right, None) if right.dim() == 1 else torch.linalg.eigh(right)
        # Rounding can leave eigenvalues below zero.
        return cls(values.clamp_min(0.0), basis, left_values.clamp_min(0.0), left_basis)

    @property
    def largest(self) -> Tensor:
        """The largest eigenvalue."""
        return self.right.amax() * self.left.amax()

    def solve(self, matrix: Tensor, shift: Tensor) -> Tensor:
        """Return X with G X A + shift X = matrix; in the dtype of the factors inside, in that of `matrix` outside."""
        inside = self.left_basis.mT @ matrix.to(self.left)
        if self.right_basis is not None:
            inside = inside @ self.right_basis
        solved = self.left_basis @ (inside / (torch.outer(self.left, self.right) + shift))
        if self.right_basis is not None:
            solved = solved @ self.right_basis.mT
        return solved.to(matrix)
