"""Parts of the Krylov methods: vectors that they own, inner products as numbers, and a stopping rule."""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor

from ..tensors import Tensors, dot, subtract, zeros_like
from .solver import LinearSolution, MatVec

__all__ = ["Stopping", "begin", "dots", "first_step", "inner", "numbers", "restarted"]

_HALF = (torch.bfloat16, torch.float16)


def begin(matvec: MatVec, rhs: Tensors, initial: Tensors | None) -> tuple[Tensors, Tensors, int]:
    """Return the first solution and its residual, both of which may be overwritten, and the number of products spent."""
    if initial is None:
        return zeros_like(rhs), tuple(x.clone() for x in rhs), 0
    return tuple(x.clone() for x in initial), subtract(rhs, matvec(initial)), 1


def first_step(product: Tensors, size: float) -> float:
    """Return alpha = ||b|| / ||A d||: the step along d of a method that cannot complete its first iteration; 1 if A d = 0.

    A method that stays at zero pulls every cotangent back to zero. This is the step of steepest descent that truncated Newton
    methods take along a direction of negative curvature (Nocedal & Wright 2006, algorithm 7.1), in the units of A^-1 b: its
    image A d is as long as b, as that of a solution is. (|<d, A d>| / <d, d> as the divisor can vanish although A d does not.)
    """
    (square,) = dots((product, product))
    return size / math.sqrt(square) if square > 0 else 1.0


def restarted(cold: LinearSolution, warm: LinearSolution) -> LinearSolution:
    """Return the solution from zero, with the products of a warm start that could not complete its first iteration.

    A run that kept such a start would keep it for ever, whatever the right-hand side becomes.
    """
    ranges = [solution.curvature for solution in (cold, warm) if solution.curvature is not None]
    return attrs.evolve(
        cold,
        products=cold.products + warm.products,
        curvature=(min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else None,
        remark=cold.remark or warm.remark,
    )


def dots(*pairs: tuple[Tensors, Tensors]) -> list[float]:
    """Return inner products as numbers, in one transfer from a GPU, since each transfer stalls it."""
    return numbers(*(inner(a, b) for a, b in pairs))


def numbers(*scalars: Tensor) -> list[float]:
    """Return scalar tensors as numbers, in one transfer from a GPU."""
    if scalars[0].device.type == "cpu":
        return [scalar.item() for scalar in scalars]
    values: list[float] = torch.stack(scalars).tolist()
    return values


def inner(a: Tensors, b: Tensors) -> Tensor:
    """Return an inner product, a scalar tensor.

    The half precisions are summed in single precision, in which squares neither overflow nor vanish.
    """
    # Most vectors are one long tensor, and small problems take many inner products.
    if len(a) == 1 and a[0].dim() == 1 and type(a[0]) is Tensor and a[0].dtype not in _HALF:
        return torch.dot(a[0], b[0])
    return dot(_widened(a), _widened(b))


def _widened(vector: Tensors) -> Tensors:
    return tuple(x.float() if x.dtype in _HALF else x for x in vector)


@attrs.frozen
class Stopping:
    """The stopping rule: a residual of rtol ||b||, or one that rounding keeps from being known any better.

    Args:
        rtol: the tolerance.
        rounding: the relative rounding of b's dtype, a few times over.
        size: ||b||.
        start: the norm of the first residual; a distant start leaves rounding in proportion to it.
    """

    rtol: float
    rounding: float
    size: float
    start: float

    @classmethod
    def of(cls, rtol: float, rhs: Tensors, size: float, start: float) -> Stopping:
        return cls(rtol, 4 * max(torch.finfo(x.dtype).eps for x in rhs), size, start)

    def met(self, residual: float) -> bool:
        """Return True if the solver may stop at a residual of this norm."""
        return residual <= max(self.rtol * self.size, self.rounding * max(self.size, self.start))

    def converged(self, residual: float) -> bool:
        """Return True if the system counts as solved: to the tolerance, or to rounding relative to b if that is coarser."""
        return residual <= max(self.rtol, self.rounding) * self.size

    def remark(self, residual: float) -> str:
        """Return a sentence if the residual reached rounding before the tolerance, else an empty one."""
        if self.met(residual) and residual > self.rtol * self.size and math.isfinite(residual):
            return f"the residual reached rounding error ({residual / self.size:.1g}) before rtol={self.rtol:g}"
        return ""
