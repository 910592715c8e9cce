"""The method of minimal residuals."""

from __future__ import annotations

import math
from typing import ClassVar

import attrs
import torch

from ..errors import NonFiniteError
from ..tensors import Tensors, zeros_like
from ..validation import at_least
from .krylov import Stopping, begin, dots, restarted
from .solver import LinearSolution, LinearSolver, MatVec, SolveCost

__all__ = ["MINRES"]


@attrs.frozen(kw_only=True)
class MINRES(LinearSolver):
    """Minimal residuals (Paige & Saunders 1975) for a symmetric A, definite or indefinite, one product an iteration.

    Iterate k minimises ||b - A x|| over x_0 + span{r_0, A r_0, ..., A^{k-1} r_0}: Lanczos' recurrence makes A tridiagonal
    there, and plane rotations bring that to triangular form as it grows. The method keeps six vectors.

    The residual is that of the recurrence; rounding, or differences in place of products, can leave the true one larger.
    The curvature is measured along Lanczos' vectors and along the residuals. Negative curvature is not an obstacle and adds
    no remark; the residuals show it as soon as the span contains any (Liu & Roosta 2022, arXiv 2206.05732). If A is singular
    and b outside its range, the method stops at the least residual and adds a remark. If A b = 0, it returns b, since zero
    would pull every cotangent back to zero.

    Args:
        iterations: the most iterations.
        rtol: stop when ||b - A x|| <= rtol ||b||, or at rounding if that comes first.
        damping: added to the diagonal of A.

    Example:
        >>> indefinite = torch.tensor([2.0, -1.0])
        >>> solution = mlopt.linear.MINRES(iterations=2).solve(lambda v: (indefinite * v[0],), (torch.ones(2),))
        >>> torch.allclose(solution.value[0], 1 / indefinite)
        True
    """

    takes_shards: ClassVar[bool] = True

    iterations: int = attrs.field(default=10, validator=at_least(1))
    rtol: float = attrs.field(default=1e-10, validator=at_least(0.0))
    damping: float = attrs.field(default=0.0, validator=at_least(0.0))

    def cost(self, unknowns: int) -> SolveCost:
        return SolveCost(6, self.iterations)

    def _solve(self, matvec: MatVec, rhs: Tensors, size: float, initial: Tensors | None) -> LinearSolution:
        # `vector` and `before` are Lanczos' last two vectors, `direction` and `older` the last two directions of the solution.
        # All are overwritten in place; arguments and products never are.
        solution, vector, spent = begin(matvec, rhs, initial)
        start = math.sqrt(dots((vector, vector))[0])
        stopping = Stopping.of(self.rtol, rhs, size, start)
        torch._foreach_div_(vector, start or 1.0)
        before, direction, older = zeros_like(rhs), zeros_like(rhs), zeros_like(rhs)
        residual, beta, cosine, sine, above, top = start, 0.0, 1.0, 0.0, 0.0, 0.0
        low, high, largest, remark, k = math.inf, -math.inf, 0.0, "", 0
        while k < self.iterations and not stopping.met(abs(residual)):
            product = matvec(vector)
            spent += 1
            torch._foreach_mul_(before, -beta)
            torch._foreach_add_(before, product)
            (alpha,) = dots((vector, before))
            torch._foreach_add_(before, vector, alpha=-alpha)
            # Column k of the tridiagonal matrix is (beta before, alpha, beta). Earlier rotations turned its upper part into
            # (top, above), and the last of them now acts on (above, alpha).
            middle, corner = cosine * above + sine * alpha, cosine * alpha - sine * above
            torch._foreach_mul_(older, -top)
            torch._foreach_add_(older, direction, alpha=-middle)
            torch._foreach_add_(older, vector)
            squares = dots((before, before), (older, older))
            if not all(map(math.isfinite, squares)):
                raise NonFiniteError(f"{self}: a product with the Hessian is not finite at iteration {k + 1}")
            previous, beta, length = beta, math.sqrt(squares[0]), math.sqrt(squares[1])
            low, high = min(low, alpha, cosine * corner), max(high, alpha, cosine * corner)
            largest = max(largest, math.hypot(previous, alpha, beta))
            diagonal = math.hypot(corner, beta)
            # The next direction w is `older` over the diagonal, with ||A w|| = 1 up to an error of eps ||A|| ||w||. If that
            # error is large, w lies in the null space, and a step along it would blow the solution up.
            if length * largest >= diagonal * stopping.rounding ** (-2 / 3):
                remark = f"numerically singular: the residual stays at {abs(residual) / size:.3g}; raise the damping"
                break
            k += 1
            torch._foreach_div_(older, diagonal)
            direction, older = older, direction
            top, above = sine * beta, cosine * beta
            cosine, sine = corner / diagonal, beta / diagonal
            torch._foreach_add_(solution, direction, alpha=cosine * residual)
            residual *= -sine
            torch._foreach_div_(before, beta or 1.0)
            vector, before = before, vector
        stuck = k == 0 and remark != ""
        reached = LinearSolution(
            value=tuple(x.clone() for x in rhs) if stuck else solution,
            residual=abs(residual) / size,
            iterations=k,
            products=spent,
            converged=stopping.converged(abs(residual)),
            curvature=(low, high) if high >= low else None,
            remark=remark or stopping.remark(abs(residual)),
        )
        return restarted(self._solve(matvec, rhs, size, None), reached) if stuck and initial is not None else reached
