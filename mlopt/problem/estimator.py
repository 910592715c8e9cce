"""What an estimator is to the graph: a rule that linearises a level's solution, and pulls cotangents back through it."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs
from torch import Tensor

from ..errors import EstimatorError
from ..tensors import Tensors

if TYPE_CHECKING:
    from .point import Point

__all__ = ["Block", "Estimator", "Linearization", "Report", "Vectors"]

#: A block of variables: a level's name or, for the multiplier of a level inside a nested one, a pair (level, block).
Block: TypeAlias = Any
Vectors: TypeAlias = Mapping[Block, Tensors]


@attrs.define(kw_only=True, eq=False)
class Report:
    """How one level was pulled back.

    Attributes:
        estimator: the estimator, as it prints.
        residual: the largest ||v - H q|| / ||v|| of the linear solves, as the solver has it, or None where none was measured.
        iterations: iterations of all its linear solves together.
        products: products with second derivatives of all its linear solves together.
        solves: linear solves taken: one, and more where a nested level's Hessian asks for them.
        converged: whether every solve reached its tolerance; None where it was not measured.
        curvature: the smallest and largest Rayleigh quotients of the Hessian that were met, or None.
        step: the last finite-difference step, in units of the vector it was taken along, or None.
        age: how many outer steps old the cotangent is that this gradient was formed with; zero unless streamed.
        seconds: wall-clock time spent.
        remarks: sentences about what went wrong, without repetition.
    """

    estimator: str
    residual: float | None = None
    iterations: int = 0
    products: int = 0
    solves: int = 0
    converged: bool | None = None
    curvature: tuple[float, float] | None = None
    _step: float | Tensor | None = attrs.field(default=None, repr=False)
    age: int = 0
    seconds: float = 0.0
    remarks: tuple[str, ...] = ()

    @property
    def step(self) -> float | None:
        """The last finite-difference step; it is fetched from its device when it is asked for."""
        return None if self._step is None else float(self._step)

    @step.setter
    def step(self, step: float | Tensor | None) -> None:
        self._step = step

    @property
    def doubtful(self) -> bool:
        """Whether something went wrong and the tolerance was not reached all the same: then do not trust the answer."""
        return bool(self.remarks) and self.converged is not True


class Linearization(ABC):
    """The derivative of one level's solution with respect to its arguments, at a point.

    Attributes:
        blocks: what a cotangent may lie on: the level itself and the levels solved inside it that it depends on.
        arguments: the levels outside that the solution depends on.
        report: filled in as products are spent.
    """

    blocks: tuple[Block, ...]
    arguments: tuple[str, ...]
    report: Report

    @abstractmethod
    def pullback(self, cotangent: Vectors, wanted: Sequence[str] | None = None) -> dict[Block, Tensors]:
        """Return the cotangent on the arguments that a cotangent on the blocks gives.

        Args:
            cotangent: by block; absent blocks are zero.
            wanted: the arguments asked for; all when None.

        Returns:
            By argument; absent ones are zero.
        """

    def reports(self) -> dict[str, Report]:
        """Return the report of this level, and of those inside it that were pulled back along with it."""
        return {str(self.blocks[0]): self.report}


class Estimator(ABC):
    """A rule that linearises a level's solution: its pullback is the vector-Jacobian product of x*(u).

    Attributes:
        curvature_data: batches for the Hessian, where the estimator does not take the level's; else None.
    """

    curvature_data: Iterable[Any] | None = None

    @abstractmethod
    def linearize(self, point: Point, level: str) -> Linearization:
        """Return the derivative of the solution of `level` at `point`."""

    def at_solution(self, point: Point, level: str) -> contextlib.AbstractContextManager[None]:
        """Return a context within which the level's variables are where the rule takes its solution to be.

        They are the present ones unless a rule says otherwise. What is moved is put back, from copies, on leaving; the
        generators are back already when the context is entered.
        """
        return contextlib.nullcontext()

    def _refuse_levels_inside(self, point: Point, level: str) -> None:
        """Raise where the level's objective depends on the solutions of levels inside it."""
        interior = point.problem.graph[level].interior
        if interior:
            raise EstimatorError(
                f"level {level!r}: its objective depends on the solutions of {', '.join(map(repr, interior))} inside it, and "
                f"{self} cannot differentiate through those: use Identity, FiniteDifference, Neumann, ConjugateGradient, MINRES, "
                "Nystrom or Dense"
            )
