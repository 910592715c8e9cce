"""The method of conjugate gradients."""

from __future__ import annotations

import math

import attrs

from ..errors import NonFiniteError
from ..tensors import Tensors, axpy, dot, norm, subtract, zeros_like
from ..validation import at_least
from .solver import LinearSolution, LinearSolver, MatVec

__all__ = ["ConjugateGradient"]


@attrs.frozen(kw_only=True)
class ConjugateGradient(LinearSolver):
    """Conjugate gradients (Hestenes & Stiefel 1952) for a positive definite A, one product an iteration.

    The residual is that of the recurrence: rounding, or differences in place of products, can leave the true one larger.
    Where a direction of negative or no curvature turns up, A is not positive definite: the solver stops, keeps the
    iterate it has, and says so.

    Args:
        iterations: the most iterations.
        rtol: stop when ||b - A x|| <= rtol ||b||.
        damping: added to the diagonal of A.
    """

    iterations: int = attrs.field(default=10, validator=at_least(1))
    rtol: float = attrs.field(default=1e-10, validator=at_least(0))
    damping: float = attrs.field(default=0.0, validator=at_least(0))

    def _solve(self, matvec: MatVec, rhs: Tensors, size: float, initial: Tensors | None) -> LinearSolution:
        solution = zeros_like(rhs) if initial is None else initial
        residual = rhs if initial is None else subtract(rhs, matvec(initial))
        spent = 0 if initial is None else 1
        direction, square = residual, float(dot(residual, residual))
        low, high, remark, k = math.inf, -math.inf, "", 0
        while k < self.iterations and math.sqrt(square) > self.rtol * size:
            product = matvec(direction)
            spent += 1
            curvature = float(dot(direction, product))
            quotient = curvature / float(dot(direction, direction))
            low, high = min(low, quotient), max(high, quotient)
            if not math.isfinite(curvature):
                raise NonFiniteError(f"{self}: a product with the Hessian is not finite at iteration {k + 1}")
            if curvature <= 0:
                remark = f"negative curvature {quotient:.3g} at iteration {k + 1}; raise the damping"
                break
            k += 1
            alpha = square / curvature
            solution = axpy(alpha, direction, solution)
            residual = axpy(-alpha, product, residual)
            previous, square = square, float(dot(residual, residual))
            direction = axpy(square / previous, direction, residual)
        relative = float(norm(residual)) / size
        return LinearSolution(
            value=solution,
            residual=relative,
            iterations=k,
            products=spent,
            converged=relative <= self.rtol,
            curvature=(low, high) if spent and high >= low else None,
            remark=remark,
        )
