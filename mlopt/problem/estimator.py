"""The interface of an estimator: a rule that linearises a level's solution and pulls cotangents back through it."""

from __future__ import annotations

import contextlib
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import attrs
from torch import Tensor

from ..errors import EstimatorError
from ..tensors import Tensors
from .cost import LevelSize, PullbackCost

if TYPE_CHECKING:
    from .point import Point

__all__ = ["Block", "Estimator", "Linearization", "Report", "Vectors"]

#: A block of variables: a level's name or, for the multiplier of a level inside a nested one, a pair (level, block).
Block: TypeAlias = Any
Vectors: TypeAlias = Mapping[Block, Tensors]


@attrs.define(kw_only=True, eq=False)
class Report:
    """The report on the pullback of one level.

    Attributes:
        estimator: the estimator, as it prints.
        residual: largest ||v - H q|| / ||v|| of the linear solves, as the solver computes it; None if it was not measured.
        iterations: total iterations of the linear solves, or total steps of the levels inside.
        products: total products with second derivatives of the linear solves.
        solves: number of linear solves: one, or more for a level inside another whose Hessian needs them. Or the number of times
            that the levels inside were stepped again.
        converged: True if every solve reached its tolerance; None if that was not measured.
        curvature: the smallest and largest Rayleigh quotients of the Hessian in the solves, or None.
        step: the last finite-difference step, in units of the vector it was taken along, or None. For `RealSteps`, h.
        age: age of the cotangent in outer steps; zero unless streamed.
        gradient_norm: ||g||, g the gradient of what the level's optimiser minimises (decay and `maximize` included, variables
            held at a bound left out), on the batch of the pullback or of the level's last step. For a level with a residual, g is
            the residual. None if no evaluation of the pullback or of the run left it behind.
        stationarity: the distance d of the level from its solution, relative to its variables: d / (||x|| + d), from 0 at the
            solution to 1. d is ||g|| over the smallest curvature that the solver met, or P g for a solver that assumes the
            inverse P of the Hessian; 0.03 says that about 3% of ||x|| is missing. Implicit estimators assume 0. None without g
            or a curvature.
        seconds: wall-clock time spent.
        remarks: sentences about what went wrong, without repetition.

    Example:
        >>> mlopt.Report(estimator="Dense()", remarks=("negative curvature -1",)).doubtful
        True
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
    _gradient_norm: float | Tensor | None = attrs.field(default=None, repr=False)
    #: ||P g|| for a solver that assumes the inverse P of the Hessian, and ||x||; on the device.
    _distance: float | Tensor | None = attrs.field(default=None, repr=False)
    _size: float | Tensor | None = attrs.field(default=None, repr=False)
    seconds: float = 0.0
    remarks: tuple[str, ...] = ()

    @property
    def gradient_norm(self) -> float | None:
        """The norm of the gradient of what the level's optimiser minimises; reading it waits for its device."""
        return None if self._gradient_norm is None else float(self._gradient_norm)

    @property
    def stationarity(self) -> float | None:
        """The estimated distance from the solution, relative to the variables; reading it waits for their device."""
        if self._gradient_norm is None or self._size is None or (self._distance is None and self.curvature is None):
            return None
        if self._distance is not None:
            distance = float(self._distance)
        else:
            low, high = self.curvature or (0.0, 0.0)
            curvature = low if low > 0.0 else max(-low, high)
            distance = float(self._gradient_norm) / max(curvature, sys.float_info.min)
        size = float(self._size)
        return 0.0 if distance == 0.0 else 1.0 if math.isinf(distance) else distance / (size + distance)

    @property
    def is_measured(self) -> bool:
        """True if the gradient is known; reading it does not wait for a device."""
        return self._gradient_norm is not None

    def measured(
        self, gradient_norm: float | Tensor, size: float | Tensor | None, distance: float | Tensor | None = None
    ) -> None:
        """Record how far the level is from its solution: ||g||, ||x||, and ||P g|| if the inverse P is assumed.

        Without ||x||, no distance is derived from ||g|| and the curvature.
        """
        self._gradient_norm, self._size, self._distance = gradient_norm, size, distance

    @property
    def step(self) -> float | None:
        """The last finite-difference step; reading it waits for its device."""
        return None if self._step is None else float(self._step)

    @step.setter
    def step(self, step: float | Tensor | None) -> None:
        self._step = step

    def doubt(self, remark: str) -> None:
        """Add a remark, unless it is there, and take the pullback as not converged."""
        if remark not in self.remarks:
            self.remarks = (*self.remarks, remark)
        self.converged = False

    @property
    def doubtful(self) -> bool:
        """True if something went wrong and the tolerance was not reached: do not trust the answer then."""
        return bool(self.remarks) and self.converged is not True


class Linearization(ABC):
    """The derivative of one level's solution with respect to its arguments, at a point.

    Attributes:
        blocks: the blocks of a cotangent: the level itself and the levels solved inside it that it depends on.
        arguments: the levels outside that the solution depends on.
        report: the report, updated with every product.

    Example:
        >>> class Constant(mlopt.estimators.Linearization):  # of a solution that its arguments do not change
        ...     def pullback(self, cotangent, wanted=None):
        ...         return {}
    """

    blocks: tuple[Block, ...]
    arguments: tuple[str, ...]
    report: Report

    @abstractmethod
    def pullback(self, cotangent: Vectors, wanted: Sequence[str] | None = None) -> dict[Block, Tensors]:
        """Return the pullback of a cotangent on the blocks, a cotangent on the arguments.

        Args:
            cotangent: vectors by block; absent blocks are zero.
            wanted: the arguments to return; all if None.

        Returns:
            Vectors by argument; absent ones are zero.
        """

    def reports(self) -> dict[str, Report]:
        """Return the reports of this level and of those inside it that were pulled back along with it."""
        return {str(self.blocks[0]): self.report}


class Estimator(ABC):
    """A rule that linearises a level's solution: its pullback is the vector-Jacobian product of x*(u).

    Attributes:
        curvature_data: batches of the rule's own, for the Hessian or for virtual steps; None to use the level's.
        curvature_batches: number of these batches that one pullback takes, or "all" of an epoch.
        references: the levels whose variables the rule uses itself. The level's loss declares them, and need not use them.
        needs_loss: the reason why the rule refuses a level with a residual; empty if it takes both.
        needs_whole: the reason why the rule refuses variables that are sharded over processes; empty if it takes them.
        needs_optimizer: True if the rule uses the steps of the level's optimiser, so that a level with a solver of its own
            refuses it.

    Example:
        >>> from mlopt.testing import quadratic
        >>> class Exact(mlopt.Estimator):
        ...     def linearize(self, point, level):
        ...         return mlopt.Dense().linearize(point, level)
        >>> case = quadratic("two", Exact())
        >>> case.error(mlopt.hypergradient(case.problem).gradient) < 1e-8
        True
    """

    needs_optimizer: ClassVar[bool] = False

    @property
    def curvature_data(self) -> Iterable[Any] | None:
        """Batches of the rule's own, for the Hessian or for virtual steps; None to use the level's."""
        return None

    @property
    def curvature_batches(self) -> int | Literal["all"]:
        """The number of these batches that one pullback takes, or "all" of an epoch."""
        return 1

    @property
    def references(self) -> tuple[str, ...]:
        """The levels whose variables the rule uses itself."""
        return ()

    @property
    def needs_loss(self) -> str:
        return "it differentiates the minimum of a loss"

    @property
    def needs_whole(self) -> str:
        return "it is not known to take first derivatives alone, and second ones do not pass through the hooks of fully_shard"

    @abstractmethod
    def linearize(self, point: Point, level: str) -> Linearization:
        """Return the derivative of the solution of `level` at `point`."""

    def at_solution(self, point: Point, level: str) -> contextlib.AbstractContextManager[None]:
        """Return a context within which the level's variables are at the solution that the rule assumes.

        By default that is their present value. A rule that moves them restores them, from copies, on exit, and leaves the
        generators as they were before it entered the context.
        """
        return contextlib.nullcontext()

    def cost(self, size: LevelSize) -> PullbackCost | None:
        """Return the most that one pullback takes, given what parts of a level's evaluations take; None if not known."""
        return None

    def _refuse_levels_inside(self, point: Point, level: str) -> None:
        """Raise if the level's objective depends on the solutions of levels inside it."""
        interior = point.problem.graph[level].interior
        if interior:
            raise EstimatorError(
                f"level {level!r}: its objective depends on the solutions of {', '.join(map(repr, interior))} inside it, and "
                f"{self} cannot differentiate through those: use Identity, FiniteDifference, Neumann, ConjugateGradient, MINRES, "
                "Nystrom or Dense"
            )
