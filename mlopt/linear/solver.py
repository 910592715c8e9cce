"""The base of the linear solvers: each finds x with (A + damping I) x ~ b from vectors and products with A alone."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import attrs
import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..tensors import Tensors, axpy, flatten, is_finite, norm, unflatten, zeros_like

__all__ = ["LinearSolution", "LinearSolver", "MatVec"]

MatVec: TypeAlias = Callable[[Tensors], Tensors]


@attrs.frozen(kw_only=True, eq=False)
class LinearSolution:
    """The result of a linear solve.

    Attributes:
        value: the solution x, in the shapes of the right-hand side.
        residual: ||b - A x|| / ||b||, or None if no product was spent on it.
        iterations: the number of iterations.
        products: the number of products with A.
        converged: True if the residual fell to the tolerance; None if it was not measured.
        curvature: the smallest and largest Rayleigh quotient <p, A p> / <p, p> that the solver met, or None.
        remark: a sentence about a difficulty (negative curvature, divergence), else "".

    Example:
        >>> solution = mlopt.linear.Dense().solve(lambda v: (2.0 * v[0],), (torch.ones(3),))
        >>> solution.value, solution.converged, solution.curvature
        ((tensor([0.5000, 0.5000, 0.5000]),), True, (2.0, 2.0))
    """

    value: Tensors
    residual: float | None = None
    iterations: int = 0
    products: int = 0
    converged: bool | None = None
    curvature: tuple[float, float] | None = None
    remark: str = ""


#: The message for a right-hand side that is not finite.
NOT_FINITE = (
    "the right-hand side of a linear solve (the cotangent on a level's solution) is not finite: look at the loss that refers to "
    "this level"
)


class LinearSolver(ABC):
    """A rule that finds x with (A + damping I) x ~ b for an A that is known by its products only.

    A is symmetric, unless the class sets `needs_symmetry = False`. Implement `_solve`. Every solver returns zero for b = 0
    without a product, and raises if its solution is not finite.

    Example:
        >>> class Scaled(mlopt.linear.LinearSolver):
        ...     damping = 0.0
        ...
        ...     def _solve(self, matvec, rhs, size, initial):
        ...         return mlopt.linear.LinearSolution(value=(0.5 * rhs[0],))
        >>> Scaled().solve(lambda v: v, (torch.ones(2),)).value
        (tensor([0.5000, 0.5000]),)
    """

    #: Added to the diagonal of A.
    damping: float
    #: If True, A must be symmetric, as the Hessian of a loss is and the derivative of a condition is not.
    needs_symmetry: ClassVar[bool] = True
    #: If True, `_solve` receives each vector as one flat tensor, provided that its parts share a dtype and a device.
    _in_one: ClassVar[bool] = True

    def __str__(self) -> str:
        """Return the name, the first argument, and the other arguments that differ from their defaults."""
        kind: Any = type(self)
        fields = attrs.fields(kind) if attrs.has(kind) else ()
        shown = [f for k, f in enumerate(fields) if f.repr and (k == 0 or getattr(self, f.name) != f.default)]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    def solve(self, matvec: MatVec, rhs: Tensors, *, initial: Tensors | None = None) -> LinearSolution:
        """Return x with (A + damping I) x ~ b.

        Args:
            matvec: takes v and returns A v, in the shapes of `rhs`.
            rhs: the right-hand side b.
            initial: the start; zero if None.

        Raises:
            NonFiniteError: the right-hand side or the solution holds NaN or infinity.
        """
        size = float(norm(rhs))
        if not _least(rhs) < size < math.inf:
            return self._solve_rescaled(matvec, rhs, initial)

        one = self._in_one and len({(x.dtype, x.device) for x in rhs}) == 1

        def damped(vector: Tensors) -> Tensors:
            product = (_joined(matvec(unflatten(vector[0], rhs))),) if one else matvec(vector)
            return axpy(self.damping, vector, product) if self.damping else product

        if one:
            # Arithmetic on one long vector takes one kernel; a network has hundreds of parameters.
            start = None if initial is None else (flatten(initial),)
            solution = self._solve(damped, (flatten(rhs),), size, start)
            solution = attrs.evolve(solution, value=unflatten(solution.value[0], rhs))
        else:
            solution = self._solve(damped, rhs, size, initial)
        if not is_finite(solution.value):
            raise NonFiniteError(self._overflow(solution))
        return solution

    def _solve_rescaled(self, matvec: MatVec, rhs: Tensors, initial: Tensors | None) -> LinearSolution:
        """Solve for a right-hand side that is zero or not finite, or whose squares are outside the range of their dtype."""
        sizes = [float(x.abs().max()) for x in rhs if x.numel()]
        if not all(map(math.isfinite, sizes)):
            raise NonFiniteError(NOT_FINITE)
        largest = max(sizes, default=0.0)
        if largest == 0.0:
            return LinearSolution(value=zeros_like(rhs), residual=0.0, converged=True)
        # A power of two changes no digits; one factor would overflow for the least numbers of a dtype.
        exponent = -math.frexp(largest)[1]
        start = None if initial is None else _shifted(initial, exponent)
        solution = self.solve(matvec, _shifted(rhs, exponent), initial=start)
        value = _shifted(solution.value, -exponent)
        if not is_finite(value):
            raise NonFiniteError(self._overflow(solution))
        return attrs.evolve(solution, value=value)

    def _overflow(self, solution: LinearSolution) -> str:
        return (
            f"{self} found a solution that is not finite after {solution.iterations} iterations; "
            "raise its damping, lower its step size or the number of iterations"
        )

    @abstractmethod
    def _solve(self, matvec: MatVec, rhs: Tensors, size: float, initial: Tensors | None) -> LinearSolution:
        """Solve for a finite right-hand side of norm `size` > 0; `matvec` includes the damping.

        A solver may overwrite a vector that it passed to `matvec`, but never one that `matvec` returned.
        """


def _least(rhs: Tensors) -> float:
    """Return a norm below which squares of the entries that matter would vanish; the half precisions are squared in single."""
    if not rhs:
        return 0.0
    kinds = [torch.finfo(torch.float32 if x.dtype.itemsize < 4 else x.dtype) for x in rhs]
    return max(math.sqrt(kind.tiny) / kind.eps for kind in kinds)


def _shifted(vector: Tensors, exponent: int) -> Tensors:
    """Return a vector times 2^exponent, in two factors, since one could be outside the range of the dtype."""
    half = exponent // 2
    return tuple(x * 2.0**half * 2.0 ** (exponent - half) for x in vector)


def _joined(product: Tensors) -> Tensor:
    """Return a product, which is never overwritten, as one vector; that of a single tensor is not copied."""
    return product[0].reshape(-1) if len(product) == 1 else flatten(product)
