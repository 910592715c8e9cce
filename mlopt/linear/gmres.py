"""The method of generalised minimal residuals, for matrices that need not be symmetric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..tensors import Tensors, axpy, scale, subtract
from ..validation import at_least, is_whole, must_be
from .krylov import Stopping, begin, dots, inner, numbers
from .normal_equations import normal_equations
from .solver import LinearSolution, LinearSolver, Matrix, MatVec, SolveCost

__all__ = ["GMRES"]

#: The share of the residual that a cycle may leave at most.
_STAGNANT = 0.99


@attrs.frozen(kw_only=True)
class GMRES(LinearSolver):
    """Generalised minimal residuals (Saad & Schultz 1986) for any square A, one product an iteration.

    Iterate k minimises ||b - A x|| over x_0 + span{r_0, A r_0, ..., A^{k-1} r_0}. Arnoldi's process makes an orthonormal basis of
    that space, in which A is a Hessenberg matrix, and plane rotations bring that to triangular form as it grows. The method keeps
    one vector for each iteration since the last restart, and three more.

    The residual is that of the small system, which is the true one as long as the basis is orthonormal; each vector is made
    orthogonal to the basis twice. The curvature is that of (A + A^T) / 2, measured on the basis. If A is singular and b outside
    its range, the solution has the least residual that the basis allows, and a remark says so. If A b = 0, it is b, since zero
    would pull every cotangent back to zero.

    Where the method stagnates, and products with A^T are known (a `Matrix`; the derivative of a condition is one), conjugate
    gradients on the normal equations take over from its solution, for as many iterations, and a remark says so. It stagnates if
    a whole cycle lowers the residual by less than a hundredth, or if A is singular on the space of the basis.

    Args:
        iterations: the most iterations, in all cycles together.
        restart: the number of iterations after which the basis is dropped, and a new one is begun at the residual; None to keep
            it. A restart bounds the memory and may prevent convergence, see above.
        rtol: stop when ||b - A x|| <= rtol ||b||, or at rounding if that comes first.
        damping: added to the diagonal of A.

    Source: Saad & Schultz 1986, SIAM Journal on Scientific and Statistical Computing 7(3).

    Example:
        >>> matrix = torch.tensor([[1.0, 2.0], [-2.0, 1.0]])
        >>> solution = mlopt.linear.GMRES(iterations=2).solve(lambda v: (matrix @ v[0],), (torch.tensor([5.0, 0.0]),))
        >>> torch.allclose(solution.value[0], torch.tensor([1.0, 2.0])), solution.converged
        (True, True)
    """

    needs_symmetry: ClassVar[bool] = False

    takes_shards: ClassVar[bool] = True

    iterations: int = attrs.field(default=30, validator=at_least(1))
    restart: int | None = attrs.field(
        default=None,
        validator=must_be(lambda value: value is None or is_whole(value, 1), "a whole number >= 1, or None"),
    )
    rtol: float = attrs.field(default=1e-10, validator=at_least(0.0))
    damping: float = attrs.field(default=0.0, validator=at_least(0.0))

    def cost(self, unknowns: int) -> SolveCost:
        # The basis of one cycle.
        return SolveCost(min(self.restart or self.iterations, self.iterations) + 2, self.iterations)

    def _solve(self, matvec: MatVec, rhs: Tensors, size: float, initial: Tensors | None) -> LinearSolution:
        solution, residual, spent = begin(matvec, rhs, initial)
        remaining = math.sqrt(dots((residual, residual))[0])
        stopping = Stopping.of(self.rtol, rhs, size, remaining)
        ranges: list[tuple[float, float]] = []
        norm = 0.0
        k, singular, stagnant, whole = 0, False, False, isinstance(matvec, Matrix)
        longest = min(self.restart or self.iterations, self.iterations)
        while k < self.iterations and not singular and not stagnant and not stopping.met(remaining):
            cycle = _Cycle(self, matvec, residual, remaining, stopping)
            singular = cycle.run(min(longest, self.iterations - k), k)
            k += cycle.length
            norm = max(norm, cycle.norm)
            ranges.append(cycle.curvature())
            coefficients, rest = cycle.least_squares()
            for coefficient, vector in zip(coefficients, cycle.basis, strict=False):
                torch._foreach_add_(solution, vector, alpha=coefficient)
            before, remaining = remaining, math.hypot(*rest)
            stagnant = whole and cycle.length == longest and remaining > _STAGNANT * before
            if not singular and k < self.iterations:
                residual = scale(rest[0], cycle.basis[0])
                for share, vector in zip(rest[1:], cycle.basis[1:], strict=True):
                    torch._foreach_add_(residual, vector, alpha=share)
        if isinstance(matvec, Matrix) and (stagnant or singular) and not stopping.converged(remaining):
            return self._continued(matvec, rhs, size, solution, stopping, (k, spent + k), ranges, norm)
        remark = stopping.remark(remaining)
        if k and not singular and remaining >= stopping.start * (1.0 - stopping.rounding):
            remark = (
                f"{k} iterations did not lower the residual; raise {'restart or ' if self.restart else ''}iterations"
            )
        if singular and not stopping.converged(remaining):
            remark = f"numerically singular: the residual stays at {remaining / size:.3g}; raise the damping"
            if initial is None and k == 1 and remaining >= size * (1.0 - stopping.rounding):
                solution = tuple(x.clone() for x in rhs)
        return LinearSolution(
            value=solution,
            residual=remaining / size,
            iterations=k,
            products=spent + k,
            converged=stopping.converged(remaining),
            curvature=_joined(ranges),
            remark=remark,
        )

    def _continued(
        self,
        matrix: Matrix,
        rhs: Tensors,
        size: float,
        start: Tensors,
        stopping: Stopping,
        spent: tuple[int, int],
        ranges: Sequence[tuple[float, float]],
        norm: float,
    ) -> LinearSolution:
        """Return the solution that conjugate gradients on the normal equations reach from a start.

        Args:
            matrix, rhs, size, start, stopping: of the system.
            spent: the iterations and the products so far.
            ranges: the curvature met so far.
            norm: the largest norm of a product with a unit vector so far.
        """
        iterations, products = spent
        residual = subtract(rhs, matrix(start))
        before = math.sqrt(dots((residual, residual))[0])
        solution, remaining, (k, more), singular = normal_equations(
            matrix, start, residual, self.iterations, stopping, norm
        )
        remark = stopping.remark(remaining)
        if k:
            remark = (
                f"GMRES stagnated at a residual of {before / size:.3g} after {iterations} iterations; {k} of conjugate gradients "
                f"on the normal equations lowered it to {remaining / size:.3g}"
            )
        if singular and not stopping.converged(remaining):
            remark = f"numerically singular: the residual stays at {remaining / size:.3g}; raise the damping"
            if not k and not any(bool(x.any()) for x in solution):
                solution = tuple(x.clone() for x in rhs)
        return LinearSolution(
            value=solution,
            residual=remaining / size,
            iterations=iterations + k,
            products=products + 1 + more,
            converged=stopping.converged(remaining),
            curvature=_joined(ranges),
            remark=remark,
        )


def _joined(ranges: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Return the range that holds all ranges."""
    return (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else None


class _Cycle:
    """The iterations from one start of the basis to the next.

    Args:
        solver: the solver, for messages.
        matvec: the product with A.
        residual: the residual at the start.
        size: its norm.
        stopping: the stopping rule.

    Attributes:
        basis: the orthonormal vectors; one more than iterations, unless the last product lay in their span.
        norm: the largest norm of a product with one of them.
    """

    def __init__(self, solver: GMRES, matvec: MatVec, residual: Tensors, size: float, stopping: Stopping) -> None:
        self._solver, self._matvec, self._size, self._stopping = solver, matvec, size, stopping
        self.norm = 0.0
        self.basis: list[Tensors] = [scale(1.0 / size, residual)]
        #: Columns of the Hessenberg matrix, of growing length, and what plane rotations make of them.
        self._columns: list[list[float]] = []
        self._diagonal: list[float] = []
        self._rotations: list[tuple[float, float]] = []

    @property
    def length(self) -> int:
        """The number of iterations."""
        return len(self._columns)

    def run(self, iterations: int, before: int) -> bool:
        """Extend the basis until the residual is small enough; return True if the space is exhausted.

        Args:
            iterations: the most iterations.
            before: the number of iterations of earlier cycles.
        """
        remaining = self._size
        while self.length < iterations and not self._stopping.met(remaining):
            product = self._matvec(self.basis[-1])
            (square,) = dots((product, product))
            if not math.isfinite(square):
                raise NonFiniteError(
                    f"{self._solver}: a product with the matrix is not finite at iteration {before + self.length + 1}"
                )
            column, vector = self._orthogonalised(product)
            below = math.sqrt(dots((vector, vector))[0])
            self.norm = max(self.norm, math.sqrt(square))
            exhausted = below <= self._stopping.rounding * self.norm
            column.append(0.0 if exhausted else below)
            self._columns.append(column)
            remaining *= abs(self._rotate(column))
            if exhausted:
                return True
            self.basis.append(scale(1.0 / below, vector))
        return False

    def _orthogonalised(self, product: Tensors) -> tuple[list[float], Tensors]:
        """Return the components of a product along the basis, and the rest of it; two passes remove the rounding of the first."""
        vector, column = product, [0.0] * len(self.basis)
        for _ in range(2):
            shares = numbers(*(inner(known, vector) for known in self.basis))
            for known, share in zip(self.basis, shares, strict=True):
                vector = axpy(-share, known, vector)
            column = [a + b for a, b in zip(column, shares, strict=True)]
        return column, vector

    def _rotate(self, column: list[float]) -> float:
        """Apply the earlier rotations to a column, and add the one that makes it triangular; return its sine."""
        entries = list(column)
        for k, (cosine, sine) in enumerate(self._rotations):
            upper, lower = entries[k], entries[k + 1]
            entries[k], entries[k + 1] = cosine * upper + sine * lower, cosine * lower - sine * upper
        diagonal = math.hypot(entries[-2], entries[-1])
        cosine, sine = (entries[-2] / diagonal, entries[-1] / diagonal) if diagonal else (0.0, 1.0)
        self._rotations.append((cosine, sine))
        self._diagonal.append(diagonal)
        return sine

    def _matrix(self) -> Tensor:
        """Return the Hessenberg matrix, with one row for each vector of the basis."""
        matrix = torch.zeros(len(self.basis), self.length, dtype=torch.float64, device="cpu")
        for k, column in enumerate(self._columns):
            entries = column[: len(self.basis)]
            matrix[: len(entries), k] = torch.tensor(entries, dtype=torch.float64, device="cpu")
        return matrix

    def least_squares(self) -> tuple[list[float], list[float]]:
        """Return the coefficients of the correction in the basis, and those of the residual that it leaves.

        Directions that A takes to zero, up to rounding, get no coefficient.
        """
        matrix = self._matrix()
        right = torch.zeros(len(matrix), 1, dtype=matrix.dtype, device="cpu")
        right[0] = self._size
        small = self._stopping.rounding ** (2 / 3)
        regular = min(self._diagonal) > small * max(self._diagonal)
        solved = torch.linalg.lstsq(
            matrix, right, rcond=None if regular else small, driver="gels" if regular else "gelsd"
        )
        rest: list[float] = (right - matrix @ solved.solution)[:, 0].tolist()
        coefficients: list[float] = solved.solution[:, 0].tolist()
        return coefficients, rest

    def curvature(self) -> tuple[float, float]:
        """Return the ends of the spectrum of (A + A^T) / 2 on the basis."""
        square = self._matrix()[: self.length]
        values = torch.linalg.eigvalsh((square + square.T) / 2)
        return float(values[0]), float(values[-1])
