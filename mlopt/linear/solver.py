"""The base of the linear solvers: each finds x with (A + damping I) x ~ b from vectors and products with A alone."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import attrs
import torch
from torch import Tensor

from ..errors import ArgumentError, NonFiniteError
from ..shards import any_sharded, largest
from ..tensors import Tensors, axpy, flatten, is_finite, norm, unflatten, zeros_like
from .history import History

__all__ = ["LinearSolution", "LinearSolver", "MatVec", "Matrix", "SolveCost"]

MatVec: TypeAlias = Callable[[Tensors], Tensors]


@attrs.frozen
class Matrix:
    """A product with A whose transpose is known.

    Args:
        product: takes v and returns A v.
        transposed: takes v and returns A^T v.

    Example:
        >>> matrix = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        >>> whole = mlopt.linear.Matrix(lambda v: (matrix @ v[0],), lambda v: (matrix.T @ v[0],))
        >>> whole((torch.ones(2),)), whole.transposed((torch.ones(2),))
        ((tensor([3., 1.]),), (tensor([1., 3.]),))
    """

    product: MatVec
    transposed: MatVec

    def __call__(self, vector: Tensors) -> Tensors:
        return self.product(vector)


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
        history: the history that was passed for `initial`, with this system added; None without one.

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
    history: History | None = None


@attrs.frozen
class SolveCost:
    """The most that one linear solve takes.

    Attributes:
        vectors: the number of vectors, each as long as the right-hand side, that it holds during a product, its copy of the
            right-hand side included. The product itself and two more, with which the first one is compared, are not.
        products: the number of products with A, without one for a given start.

    Example:
        >>> mlopt.linear.ConjugateGradient(iterations=7).cost(1_000)
        SolveCost(vectors=4, products=7)
    """

    vectors: int
    products: int


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
    #: If True, `_solve` takes a history for `initial`, and returns the next.
    _remembers: ClassVar[bool] = False
    #: If True, `_solve` receives each vector as one flat tensor, provided that its parts share a dtype and a device.
    _in_one: ClassVar[bool] = True

    @property
    def takes_shards(self) -> bool:
        """True if the solver computes with vectors by mlopt's functions only, so that their tensors may be sharded."""
        return False

    def __str__(self) -> str:
        """Return the name, the first argument, and the other arguments that differ from their defaults."""
        kind: Any = type(self)
        fields = attrs.fields(kind) if attrs.has(kind) else ()
        shown = [f for k, f in enumerate(fields) if f.repr and (k == 0 or getattr(self, f.name) != f.default)]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    def cost(self, unknowns: int) -> SolveCost | None:
        """Return the most that a solve for a number of unknowns takes; None if the solver does not know."""
        return None

    def solve(self, matvec: MatVec, rhs: Tensors, *, initial: Tensors | History | None = None) -> LinearSolution:
        """Return x with (A + damping I) x ~ b.

        Args:
            matvec: takes v and returns A v, in the shapes of `rhs`. A `Matrix` has A^T v as well, which some solvers use for an A
                that is not symmetric.
            rhs: the right-hand side b.
            initial: the start; zero if None. For conjugate gradients, or the `history` that the solution of the system before
                has, a new `History` for the first.

        Raises:
            NonFiniteError: the right-hand side or the solution holds NaN or infinity.
        """
        size = float(norm(rhs))
        if isinstance(initial, History) and not self._remembers:
            raise ArgumentError(f"{self} keeps no history; pass initial=None or a vector, or use ConjugateGradient")
        if not _least(rhs) < size < math.inf:
            return self._solve_rescaled(matvec, rhs, initial)

        one = self._in_one and len({(x.dtype, x.device) for x in rhs}) == 1 and not any_sharded(rhs)

        def damped(matvec: MatVec) -> MatVec:
            def product(vector: Tensors) -> Tensors:
                plain = (_joined(matvec(unflatten(vector[0], rhs))),) if one else matvec(vector)
                return axpy(self.damping, vector, plain) if self.damping else plain

            return product

        whole = (
            Matrix(damped(matvec.product), damped(matvec.transposed)) if isinstance(matvec, Matrix) else damped(matvec)
        )

        if one:
            # Arithmetic on one long vector takes one kernel; a network has hundreds of parameters.
            start: Any = initial if initial is None or isinstance(initial, History) else (flatten(initial),)
            solution = self._solve(whole, (flatten(rhs),), size, start)
            solution = attrs.evolve(solution, value=unflatten(solution.value[0], rhs))
        else:
            start = initial
            solution = self._solve(whole, rhs, size, start)
        if not is_finite(solution.value):
            raise NonFiniteError(self._overflow(solution))
        return solution

    def _solve_rescaled(self, matvec: MatVec, rhs: Tensors, initial: Tensors | History | None) -> LinearSolution:
        """Solve for a right-hand side that is zero or not finite, or whose squares are outside the range of their dtype."""
        sizes = [largest(x) for x in rhs]
        if not all(map(math.isfinite, sizes)):
            raise NonFiniteError(NOT_FINITE)
        greatest = max(sizes, default=0.0)
        if greatest == 0.0:
            return LinearSolution(value=zeros_like(rhs), residual=0.0, converged=True)
        # A power of two changes no digits; one factor would overflow for the least numbers of a dtype.
        exponent = -math.frexp(greatest)[1]
        # Its history would be in other units.
        start = None if initial is None or isinstance(initial, History) else _shifted(initial, exponent)
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
