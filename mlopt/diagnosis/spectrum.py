"""The ends of a Hessian's spectrum, estimated by a few steps of the Lanczos process."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch
from torch import Tensor

__all__ = ["Spectrum", "lanczos"]


@attrs.frozen(kw_only=True)
class Spectrum:
    """The ends of the spectrum of a symmetric matrix, estimated from a few products.

    Attributes:
        low: the smallest Ritz value: the smallest eigenvalue is at most this.
        high: the largest Ritz value: the largest eigenvalue is at least this.
        rounding: size below which an eigenvalue cannot be distinguished from zero.
        size: number of unknowns.
    """

    low: float
    high: float
    rounding: float
    size: int

    @property
    def negative(self) -> bool:
        """True if there is negative curvature."""
        return self.low < -self.rounding

    @property
    def singular(self) -> bool:
        """True if there is a direction without curvature."""
        return abs(self.low) <= self.rounding

    @property
    def condition(self) -> float:
        """A lower bound on the condition number; infinite if the matrix is not positive definite."""
        return self.high / self.low if self.low > self.rounding else float("inf")

    def damped(self, damping: float) -> Spectrum:
        """Return the spectrum with `damping` added to the diagonal."""
        return attrs.evolve(self, low=self.low + damping, high=self.high + damping)


def lanczos(matvec: Callable[[Tensor], Tensor], start: Tensor, *, steps: int) -> tuple[Tensor, float]:
    """Return Ritz values of a symmetric matrix A, and an estimate of the norm of |A|^-1 start.

    Every vector is made orthogonal to all those before it, twice: there are few, and lost orthogonality repeats eigenvalues.

    Args:
        matvec: takes v (n,) and returns A v.
        start: first vector of the Krylov space, (n,), not zero.
        steps: maximum number of products.

    Returns:
        The Ritz values (k,), ascending, and the norm, with k <= steps.

    Source: Golub & Van Loan, Matrix Computations, section 10.1.

    Example:
        >>> from mlopt.diagnosis.spectrum import lanczos
        >>> values, norm = lanczos(lambda v: torch.tensor([1.0, 4.0]) * v, torch.ones(2), steps=5)
        >>> [round(float(value), 3) for value in values]
        [1.0, 4.0]
    """
    size = float(start.norm())
    basis = [start / size]
    diagonal: list[float] = []
    adjacent: list[float] = []
    for _ in range(min(steps, start.numel())):
        product = matvec(basis[-1])
        diagonal.append(float(basis[-1] @ product))
        scale = float(product.norm())
        for _ in range(2):
            for vector in basis:
                product = product - (vector @ product) * vector
        remainder = float(product.norm())
        if remainder <= 1e-2 * scale * torch.finfo(start.dtype).eps ** 0.5:
            break
        adjacent.append(remainder)
        basis.append(product / remainder)
    k = len(diagonal)
    off = torch.tensor(adjacent[: k - 1], dtype=torch.float64, device="cpu")
    matrix = torch.diag(off.new_tensor(diagonal)) + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(matrix)
    used = values.abs() > 1e-12 * values.abs().max()
    newton = float((vectors[0, used] / values[used]).norm()) * size
    return values, newton
