"""The truncated Neumann series."""

from __future__ import annotations

import math
from typing import ClassVar

import attrs
import torch

from ..errors import NonFiniteError
from ..tensors import Tensors, axpy, norm, scale, subtract
from ..validation import at_least, positive_or_none
from .krylov import inner, numbers
from .solver import LinearSolution, LinearSolver, MatVec, SolveCost

__all__ = ["Neumann", "largest_eigenvalue"]

#: A few power iterations find an eigenvalue below the largest; the margin keeps the series safe.
POWER_ITERATIONS = 10
_MARGIN = 1.2
#: The series is abandoned once the residual exceeds the right-hand side by this factor.
_DIVERGED = 1e4


@attrs.frozen(kw_only=True)
class Neumann(LinearSolver):
    """x = alpha sum_{j=0}^{K} (I - alpha A)^j b, K products.

    This is Richardson's iteration x <- x + alpha (b - A x). It converges for 0 < alpha < 2 / lambda_max if A is positive
    definite (Lorraine et al. 2020, arXiv 1911.02590). The reported residual is that of the sum without its last term, which
    needs no further product; if the series converges, the true residual is smaller. If A is not symmetric, it converges where the
    eigenvalues of I - alpha A lie within the unit circle, and the largest product stands in for lambda_max.

    Args:
        iterations: K, the number of products.
        step_size: alpha; if None, 1 / (1.2 lambda_max) with lambda_max from ten power iterations, ten products.
        rtol: stop when ||b - A x|| <= rtol ||b||.
        damping: added to the diagonal of A.

    Example:
        >>> solver = mlopt.linear.Neumann(iterations=20, step_size=0.5)
        >>> solver.solve(lambda v: (torch.tensor([1.0, 2.0]) * v[0],), (torch.ones(2),)).value
        (tensor([1.0000, 0.5000]),)
    """

    needs_symmetry: ClassVar[bool] = False

    takes_shards: ClassVar[bool] = True

    iterations: int = attrs.field(default=10, validator=at_least(1))
    step_size: float | None = attrs.field(default=None, validator=positive_or_none)
    rtol: float = attrs.field(default=0.0, validator=at_least(0.0))
    damping: float = attrs.field(default=0.0, validator=at_least(0.0))

    def cost(self, unknowns: int) -> SolveCost:
        return SolveCost(3, self.iterations + POWER_ITERATIONS * (self.step_size is None))

    def _solve(self, matvec: MatVec, rhs: Tensors, size: float, initial: Tensors | None) -> LinearSolution:
        alpha, spent = self.step_size, 0
        if alpha is None:
            largest, spent = largest_eigenvalue(matvec, rhs), POWER_ITERATIONS
            if not math.isfinite(largest):
                raise NonFiniteError(f"{self}: a product with the Hessian is not finite")
            if largest == 0.0:
                return LinearSolution(
                    value=rhs, residual=1.0, products=spent, converged=False, remark="no curvature along the cotangent"
                )
            alpha = 1.0 / (_MARGIN * largest)
        if initial is None:
            solution, residual = scale(alpha, rhs), rhs
        else:
            residual, spent = subtract(rhs, matvec(initial)), spent + 1
            solution = axpy(alpha, residual, initial)
        # Step and solution are overwritten in place; arguments and products never are.
        step = scale(alpha, residual)
        # With a given start, the update above is the first iteration.
        budget = self.iterations if initial is None else self.iterations - 1
        low, high, relative = math.inf, -math.inf, 1.0 if initial is None else float(norm(residual)) / size
        rounding = max(torch.finfo(x.dtype).eps for x in rhs)
        # With one iteration from a given start, nothing else shows that the series of the solves before diverges.
        remark = "" if initial is None or relative < 1.0 else f"the start is worse than zero (residual {relative:.3g})"
        k = 0
        while k < budget:
            k += 1
            product = matvec(step)
            along = inner(step, product)
            torch._foreach_add_(step, product, alpha=-alpha)
            curvature, remaining = numbers(along, norm(step).to(along.dtype))
            square = (alpha * size * relative) ** 2  # <step, step>
            # Steps below rounding change nothing, and in the end underflow: their curvature is noise.
            if square > 0 and relative > rounding:
                low, high = min(low, curvature / square), max(high, curvature / square)
            relative = remaining / alpha / size
            if not relative < 1.0:
                remark = f"the series does not converge (curvature up to {high:.3g} at step size {alpha:.3g})"
            elif alpha * abs(low) <= 4 * rounding:
                # A step that changes by no more than rounding has no curvature, of whichever sign.
                remark = f"no curvature ({low:.3g})"
            else:
                remark = "" if low > 0 else f"negative curvature {low:.3g}"
            torch._foreach_add_(solution, step)
            if relative <= self.rtol or not relative < _DIVERGED:
                break
        return LinearSolution(
            value=solution,
            residual=relative,
            iterations=self.iterations - budget + k,
            products=spent + k,
            converged=relative <= self.rtol,
            curvature=(low, high) if high >= low else None,
            remark=remark,
        )


def largest_eigenvalue(matvec: MatVec, start: Tensors) -> float:
    """Return a lower bound on |lambda|_max, close to it after ten power iterations.

    All ten are taken, since a large eigenvalue with a small share of the right-hand side shows only after the bound has settled.
    """
    vector, largest = scale(1.0 / norm(start), start), 0.0
    for _ in range(POWER_ITERATIONS):
        product = matvec(vector)
        largest = float(norm(product))
        if largest == 0.0 or not math.isfinite(largest):
            break
        vector = scale(1.0 / largest, product)
    return largest
