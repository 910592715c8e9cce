"""What a linear solver is: it finds x with (A + damping I) x ~ b, and knows vectors and a product with A, nothing else."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import attrs

from ..errors import NonFiniteError
from ..tensors import Tensors, axpy, flatten, is_finite, norm, unflatten, zeros_like

__all__ = ["LinearSolution", "LinearSolver", "MatVec"]

MatVec: TypeAlias = Callable[[Tensors], Tensors]


@attrs.frozen(kw_only=True, eq=False)
class LinearSolution:
    """What a linear solve found.

    Attributes:
        value: the solution x, in the shapes of the right-hand side.
        residual: ||b - A x|| / ||b||, or None where no product was spent on it.
        iterations: iterations taken.
        products: products with A spent.
        converged: whether the residual fell to the tolerance; None where it was not measured.
        curvature: the smallest and largest Rayleigh quotient <p, A p> / <p, p> that was met, or None.
        remark: a sentence where something is to be said (negative curvature, divergence), else "".
    """

    value: Tensors
    residual: float | None = None
    iterations: int = 0
    products: int = 0
    converged: bool | None = None
    curvature: tuple[float, float] | None = None
    remark: str = ""


#: What is said of a right-hand side that is not finite.
NOT_FINITE = (
    "the right-hand side of a linear solve (the cotangent on a level's solution) is not finite: look at the loss that refers to "
    "this level"
)


class LinearSolver(ABC):
    """A rule that finds x with (A + damping I) x ~ b for a symmetric A that is known by its products only.

    Implement `_solve`. Zero in gives zero out for every solver, at no product of its own; a solution that is not finite raises.
    """

    #: Added to the diagonal of A.
    damping: float
    #: Whether `_solve` is given vectors in one tensor, where they are of one dtype and on one device.
    _in_one: ClassVar[bool] = True

    def __str__(self) -> str:
        """Return the name, the first argument, and those others that are not as they are by default."""
        kind: Any = type(self)
        fields = attrs.fields(kind) if attrs.has(kind) else ()
        shown = [f for k, f in enumerate(fields) if f.repr and (k == 0 or getattr(self, f.name) != f.default)]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    def solve(self, matvec: MatVec, rhs: Tensors, *, initial: Tensors | None = None) -> LinearSolution:
        """Return x with (A + damping I) x ~ b.

        Args:
            matvec: takes v and returns A v, in the shapes of `rhs`.
            rhs: the right-hand side b.
            initial: where to start from; zero when None.

        Raises:
            NonFiniteError: the right-hand side, or the solution found, holds NaN or infinity.
        """
        size = float(norm(rhs))
        if not math.isfinite(size):
            raise NonFiniteError(NOT_FINITE)
        if size == 0.0:
            return LinearSolution(value=zeros_like(rhs), residual=0.0, converged=True)

        one = self._in_one and len({(x.dtype, x.device) for x in rhs}) == 1

        def damped(vector: Tensors) -> Tensors:
            product = (flatten(matvec(unflatten(vector[0], rhs))),) if one else matvec(vector)
            return axpy(self.damping, vector, product) if self.damping else product

        if one:
            # Arithmetic on one long vector takes one kernel, where a network has hundreds of parameters.
            start = None if initial is None else (flatten(initial),)
            solution = self._solve(damped, (flatten(rhs),), size, start)
            solution = attrs.evolve(solution, value=unflatten(solution.value[0], rhs))
        else:
            solution = self._solve(damped, rhs, size, initial)
        if not is_finite(solution.value):
            raise NonFiniteError(
                f"{self} found a solution that is not finite after {solution.iterations} iterations; "
                "raise its damping, lower its step size or the number of iterations"
            )
        return solution

    @abstractmethod
    def _solve(self, matvec: MatVec, rhs: Tensors, size: float, initial: Tensors | None) -> LinearSolution:
        """Solve for a finite right-hand side of norm `size` > 0; `matvec` has the damping in it.

        A vector handed to `matvec` may be written over later, and one that it returned never is.
        """
