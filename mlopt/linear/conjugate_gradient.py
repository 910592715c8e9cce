"""The method of conjugate gradients, preconditioned or not."""

from __future__ import annotations

import math
from collections import deque
from typing import ClassVar

import attrs
import torch

from ..errors import EstimatorError, NonFiniteError
from ..tensors import Tensors, overwrite, subtract
from ..validation import at_least, must_be, one_of
from .history import History, Pair
from .krylov import Stopping, begin, dots, first_step, restarted
from .preconditioner import Preconditioner
from .solver import LinearSolution, LinearSolver, MatVec, SolveCost

__all__ = ["ConjugateGradient"]


@attrs.frozen(kw_only=True)
class ConjugateGradient(LinearSolver):
    """Conjugate gradients (Hestenes & Stiefel 1952) for a positive definite A, one product an iteration.

    The residual is that of the recurrence; rounding, or differences in place of products, can leave the true one larger.
    A direction of negative or no curvature shows that A is not positive definite; a curvature that rounding could cause counts
    as none. If it is the first direction d, a warm start is dropped, and the solution from zero is d ||b|| / ||A d||, or d if
    A d = 0. The method keeps four vectors, and one more with a preconditioner, besides those of the preconditioner. A
    preconditioner that turns out not to be positive definite is dropped. A history with pairs takes the place of the
    preconditioner.

    Args:
        iterations: the most iterations.
        rtol: stop when ||b - A x|| <= rtol ||b||, or at rounding if that comes first.
        damping: added to the diagonal of A.
        preconditioner: changes the norm in which the iterates are best, so that fewer are needed; its products are counted.
            The residual that is measured and reported remains b - A x.
        negative_curvature: the reaction to <p, A p> <= 0: "stop", keep the iterate and add a remark; "raise" an error;
            or "continue" with the recurrences and add a remark (they end where there is no curvature).

    Raises:
        ArgumentError: the preconditioner is not a `Preconditioner`.

    Example:
        >>> solution = mlopt.linear.ConjugateGradient().solve(lambda v: (4.0 * v[0],), (torch.ones(2),))
        >>> solution.value, solution.iterations
        ((tensor([0.2500, 0.2500]),), 1)
    """

    iterations: int = attrs.field(default=10, validator=at_least(1))
    rtol: float = attrs.field(default=1e-10, validator=at_least(0.0))
    damping: float = attrs.field(default=0.0, validator=at_least(0.0))
    preconditioner: Preconditioner | None = attrs.field(
        default=None,
        validator=must_be(lambda value: isinstance(value, Preconditioner | None), "a Preconditioner, or None"),
    )
    negative_curvature: str = attrs.field(default="stop", validator=one_of("stop", "raise", "continue"))

    _remembers: ClassVar[bool] = True

    @property
    def takes_shards(self) -> bool:
        return self.preconditioner is None

    def cost(self, unknowns: int) -> SolveCost | None:
        # The right-hand side, the solution, the residual and the direction.
        if self.preconditioner is None:
            return SolveCost(4, self.iterations)
        prepared = self.preconditioner.cost(unknowns)
        return None if prepared is None else SolveCost(5 + prepared.vectors, self.iterations + prepared.products)

    def _solve(self, matvec: MatVec, rhs: Tensors, size: float, initial: Tensors | History | None) -> LinearSolution:
        # Solution, residual and direction are overwritten in place; arguments and products never are.
        before, start = (initial, initial.start(rhs)) if isinstance(initial, History) else (None, initial)
        solution, residual, spent = begin(matvec, rhs, start)
        (square,) = dots((residual, residual))
        if before is not None and not square <= size**2:
            # The systems differ too much. Zero is a better start, and needs no product.
            start, square, (solution, residual, _) = None, size**2, begin(matvec, rhs, None)
        stopping = Stopping.of(self.rtol, rhs, size, math.sqrt(square))
        precondition: MatVec = _unchanged
        slope, conditioned = square, residual
        if not stopping.met(math.sqrt(square)):
            if before is not None and before.directions:
                precondition = before.precondition
            elif self.preconditioner is not None:
                precondition, more = self.preconditioner.prepare(matvec, rhs, self.damping)
                spent += more
            conditioned = precondition(residual)
            (slope,) = dots((residual, conditioned))
        direction = tuple(x.clone() for x in conditioned)
        low, high, dropped, remark, k = math.inf, -math.inf, "", "", 0
        # The half precisions are summed in single precision.
        rounding = min(stopping.rounding, 4 * torch.finfo(torch.float32).eps)
        pairs: deque[Pair] = deque(maxlen=before.limit if before is not None else 0)
        while k < self.iterations and not stopping.met(math.sqrt(square)):
            if slope <= 0:
                dropped = f"the preconditioner is not positive definite (dropped at iteration {k + 1})"
                precondition, slope = _unchanged, square
                overwrite(direction, residual)
            product = matvec(direction)
            spent += 1
            curvature, length = dots((direction, product), (direction, direction))
            if not math.isfinite(curvature):
                raise NonFiniteError(f"{self}: a product with the Hessian is not finite at iteration {k + 1}")
            quotient = curvature / length
            # Below the rounding of a product, a curvature is not known from zero, and a step along it is noise of any size.
            flat = abs(quotient) <= rounding * max(high, -low, quotient)
            low, high = min(low, quotient), max(high, quotient)
            if curvature <= 0 or flat:
                remark = remark or self._negative(quotient, k + 1)
                if self.negative_curvature == "stop" or curvature == 0 or flat:
                    if k == 0:
                        alpha = first_step(product, size)
                        torch._foreach_add_(solution, direction, alpha=alpha)
                        torch._foreach_add_(residual, product, alpha=-alpha)
                        (square,) = dots((residual, residual))
                    break
            elif before is not None:
                pairs.append((tuple(x.clone() for x in direction), product))
            k += 1
            torch._foreach_add_(solution, direction, alpha=slope / curvature)
            torch._foreach_add_(residual, product, alpha=-slope / curvature)
            conditioned, previous = precondition(residual), slope
            if conditioned is residual:
                (square,) = (slope,) = dots((residual, residual))
            else:
                slope, square = dots((residual, conditioned), (residual, residual))
            torch._foreach_mul_(direction, slope / previous)
            torch._foreach_add_(direction, conditioned)
        reached = LinearSolution(
            value=solution,
            residual=math.sqrt(square) / size,
            iterations=k,
            products=spent,
            converged=stopping.converged(math.sqrt(square)),
            curvature=(low, high) if high >= low else None,
            remark="; ".join(filter(None, (dropped, remark))) or stopping.remark(math.sqrt(square)),
            history=before and before.after(start, solution, subtract(rhs, residual), residual, pairs),
        )
        if k == 0 and remark and initial is not None:
            return restarted(self._solve(matvec, rhs, size, None), reached)
        return reached

    def _negative(self, quotient: float, iteration: int) -> str:
        # A small positive number is the rounding of zero.
        curvature = f"negative curvature {quotient:.3g}" if quotient < 0 else f"no curvature ({quotient:.3g})"
        remark = f"{curvature} at iteration {iteration}; raise the damping"
        if self.negative_curvature == "raise":
            raise EstimatorError(f"ConjugateGradient: {remark}, or use MINRES, which takes an indefinite Hessian")
        return remark


def _unchanged(vector: Tensors) -> Tensors:
    return vector
