"""Implicit differentiation: a linear solver for the level's Hessian, and a way to multiply with second derivatives."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial

import attrs

from ..errors import EstimatorError
from ..linear import LinearSolver
from ..problem import Estimator, LevelSize, Linearization, Point, PullbackCost
from .condition import Condition
from .cost import implicit_cost
from .products import COMPILED, PRODUCTS, Product
from .stationarity import Stationarity

__all__ = ["Implicit", "require_compiled"]


class Implicit(Estimator):
    """The implicit-function theorem, with a linear solver and a kind of products; the base of the estimators that use it.

    With x*(u) = argmin_x f(x, u), a cotangent v on x* becomes -(d2f / du dx) q on u, where (d2f / dx2) q = v. For a level with a
    residual F in place of a loss, it becomes -F_u^T q, where F_x^T q = v.

    Attributes:
        solver: the linear solver for q; None if it depends on the point.
        products: the kind of products with second derivatives: "autograd", "forward", "finite_difference" or, for a level without
            levels inside, "gauss_newton".
        compile: True if torch.compile compiles products with a level's loss: all of "autograd" ones, and of "forward" ones that
            with the level's own Hessian.
        warm_start: True if `solve` starts each linear solve from the q of the previous outer step.
        joint: True if one solve finds q and the response of the levels inside, which otherwise each product solves for.
        history: the number of pairs that `solve` keeps from one linear solve to the next; 0 for none.
        curvature_data: batches for the Hessian, of their own size; the level's batch if None. The mixed product is always
            taken on the level's batch. For a level without levels inside.
        curvature_batches: number of these batches over which the Hessian of one pullback is averaged, each with equal weight;
            "all" for those of one epoch. Regularizers count once. Graphs of one batch at a time are in memory; the batches
            stay where the data hold them.

    Example:
        >>> isinstance(mlopt.ConjugateGradient(iterations=5), mlopt.Implicit)
        True
        >>> print(mlopt.ConjugateGradient(iterations=5, products="forward"))
        ConjugateGradient(iterations=5) with forward products
    """

    products: str
    compile: bool = False
    warm_start: bool = False
    joint: bool = False
    history: int = 0

    @property
    @abstractmethod
    def solver(self) -> LinearSolver | None:
        """The linear solver for q; None if it depends on the point."""

    def solver_at(self, point: Point, level: str) -> LinearSolver:
        """Return the linear solver for the Hessian of a level at a point."""
        assert self.solver is not None
        return self.solver

    @property
    def product(self) -> type[Product]:
        """The class that evaluates products."""
        return (COMPILED if self.compile else PRODUCTS)[self.products]

    @property
    def needs_loss(self) -> str:
        if self.solver is None or self.solver.needs_symmetry:
            return "its linear solver needs a symmetric matrix"
        if self.products == "gauss_newton":
            return "products='gauss_newton' approximate the Hessian of a loss"
        return "compile=True compiles products with the second derivatives of a loss" if self.compile else ""

    @property
    def needs_whole(self) -> str:
        if self.products != "finite_difference":
            return (
                f"{self.products} products take second derivatives, which do not pass through the hooks of fully_shard"
            )
        if self.solver is not None and not self.solver.takes_shards:
            return f"{type(self.solver).__name__} computes with the entries of whole vectors"
        return "a history and joint solves compute with whole vectors" if self.history or self.joint else ""

    def linearize(self, point: Point, level: str) -> Linearization:
        if point.problem[level].residual is not None:
            solver = self.solver_at(point, level)
            return Condition(
                point, level, estimator=str(self), solver=solver, product=self.product, warm_start=self.warm_start
            )
        graph = point.problem.graph
        inside = [_conditions_inside(level, part, point) for part in graph[level].parts if graph[part].arguments]
        if inside:
            self._refuse_options_of_leaves(point, level, inside)
        return Stationarity(
            point,
            level,
            estimator=str(self),
            solver=partial(self.solver_at, point, level),
            products=self.products,
            product=self.product,
            compile=self.compile,
            warm_start=self.warm_start,
            history=self.history,
            joint=self.joint,
            inside=inside,
        )

    def _refuse_options_of_leaves(self, point: Point, level: str, inside: Sequence[Stationarity]) -> None:
        for option, given in {
            "products='gauss_newton'": self.products == "gauss_newton",
            "curvature_data": self.curvature_data is not None,
            type(self).__name__: self.solver is None,
            "damping or warm_start next to joint=True": self.joint
            and (self.warm_start or self.solver_at(point, level).damping > 0),
        }.items():
            if given:
                raise EstimatorError(
                    f"level {level!r}: {option} is for levels without levels inside, and "
                    f"{', '.join(repr(child.name) for child in inside)} lies inside it; leave it out"
                )

    def cost(self, size: LevelSize) -> PullbackCost | None:
        solve, batches = None if self.solver is None else self.solver.cost(size.unknowns), self.curvature_batches
        # Compiled code allocates as its compiler decides, and the number of batches of an epoch is not known before it.
        if solve is None or batches == "all" or self.joint or self.compile:
            return None
        return implicit_cost(
            solve, size, self.product, history=self.history, warm_start=self.warm_start, batches=batches
        )

    def __str__(self) -> str:
        options = {
            "compiled": self.compile,
            "warm start": self.warm_start,
            f"history of {self.history} pairs": self.history > 0,
            "curvature data": self.curvature_data is not None,
            f"{self.curvature_batches} batches": self.curvature_batches != 1,
        }
        return ", ".join(
            [f"{self.solver} with {self.products} products", *(name for name, given in options.items() if given)]
        )


def _conditions_inside(level: str, part: str, point: Point) -> Stationarity:
    """Return the stationarity conditions of a level that is solved inside another, from its own estimator."""
    estimator = point.estimator(part)
    if not isinstance(estimator, Implicit):
        raise EstimatorError(
            f"level {part!r} is solved inside {level!r}, through which cotangents are pulled back; {estimator} "
            "cannot be nested: use Identity, FiniteDifference, Neumann, ConjugateGradient, MINRES, Nystrom or Dense"
        )
    rule = estimator.linearize(point, part)
    conditions = rule if isinstance(rule, Stationarity) else getattr(rule, "conditions", None)
    if not isinstance(conditions, Stationarity):
        raise EstimatorError(
            f"level {part!r} is solved inside {level!r}, and {type(estimator).__name__}.linearize returns a "
            f"{type(rule).__name__}, whose pullback cannot be nested; let it return a Stationarity, such as that of "
            "super().linearize(point, level)"
        )
    return conditions


def require_compiled(estimator: Implicit, attribute: attrs.Attribute[bool], value: bool) -> None:
    """Validate the option `compile`: raise if the products of an estimator cannot be compiled."""
    if value and estimator.products not in COMPILED:
        raise EstimatorError(
            f"compile=True with products={estimator.products!r}: only second derivatives are compiled; use products='autograd' "
            "or 'forward'"
        )
