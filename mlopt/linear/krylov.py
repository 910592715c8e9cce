"""What the Krylov methods share: vectors that they own, inner products as numbers, and when to stop."""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor

from ..tensors import Tensors, dot, subtract, zeros_like
from .solver import MatVec

__all__ = ["Stopping", "begin", "dots"]

_HALF = (torch.bfloat16, torch.float16)


def begin(matvec: MatVec, rhs: Tensors, initial: Tensors | None) -> tuple[Tensors, Tensors, int]:
    """Return a solution to start from and its residual, both fit to be written over, and the products spent."""
    if initial is None:
        return zeros_like(rhs), tuple(x.clone() for x in rhs), 0
    return tuple(x.clone() for x in initial), subtract(rhs, matvec(initial)), 1


def dots(*pairs: tuple[Tensors, Tensors]) -> list[float]:
    """Return inner products as numbers, from a GPU all in one transfer, since each stalls it.

    The half precisions are summed in single precision, where squares neither overflow nor vanish.
    """
    products = [_dot(a, b) for a, b in pairs]
    if products[0].device.type == "cpu":
        return [product.item() for product in products]
    found: list[float] = torch.stack(products).tolist()
    return found


def _dot(a: Tensors, b: Tensors) -> Tensor:
    # Vectors are mostly one long tensor, and small problems take many of these.
    if len(a) == 1 and a[0].dim() == 1 and a[0].dtype not in _HALF:
        return torch.dot(a[0], b[0])
    return dot(_widened(a), _widened(b))


def _widened(vector: Tensors) -> Tensors:
    return tuple(x.float() if x.dtype in _HALF else x for x in vector)


@attrs.frozen
class Stopping:
    """When a residual is small enough: at rtol ||b||, or where rounding keeps b - A x from being known any better.

    Args:
        rtol: the tolerance asked for.
        rounding: the relative rounding of b's dtype, a few times over.
        size: ||b||.
        start: the norm of the residual started from; a far start leaves rounding of its own size.
    """

    rtol: float
    rounding: float
    size: float
    start: float

    @classmethod
    def of(cls, rtol: float, rhs: Tensors, size: float, start: float) -> Stopping:
        return cls(rtol, 4 * max(torch.finfo(x.dtype).eps for x in rhs), size, start)

    def met(self, residual: float) -> bool:
        """Return whether to stop at a residual of this norm."""
        return residual <= max(self.rtol * self.size, self.rounding * max(self.size, self.start))

    def converged(self, residual: float) -> bool:
        """Return whether it counts as solved: to the tolerance, or to rounding relative to b where that is coarser."""
        return residual <= max(self.rtol, self.rounding) * self.size

    def remark(self, residual: float) -> str:
        """Return a sentence where rounding was reached before the tolerance, else nothing."""
        if self.met(residual) and residual > self.rtol * self.size and math.isfinite(residual):
            return f"the residual reached rounding ({residual / self.size:.1g}) before rtol={self.rtol:g}"
        return ""
