"""Unrolled differentiation: the solution is the end of some optimiser steps, and its pullback is the adjoint of the steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import attrs

from ..problem import (
    Block,
    Estimator,
    LevelSize,
    Linearization,
    Point,
    PullbackCost,
    Report,
    Vectors,
    add_into,
    restored,
    standing_in,
)
from ..tensors import Tensors, add, norm, zeros_like
from ..validation import at_least, batches_or_none, is_whole, must_be, one_of
from .cost import unrolled_cost
from .optimizer_step import check_transformation
from .products import PRODUCTS
from .referred import Referred, level_of
from .trajectory import Held, Trajectory

__all__ = ["Unrolled"]

#: An adjoint that grew by this factor over the steps reflects rounding rather than the solution.
_DIVERGED = 1e4
#: The adjoint of a step needs products with the Hessian itself, so Gauss-Newton products are excluded.
_EXACT = [name for name in PRODUCTS if name != "gauss_newton"]


_whole_or_none = must_be(lambda value: value is None or is_whole(value, 1), "a whole number >= 1, or None")


@attrs.frozen(kw_only=True)
class Unrolled(Estimator):
    """Take the solution to be the end of T steps of the level's optimiser, and differentiate through the steps.

    With x_0 the present variables, g_t = grad_x f(x_t, u) and (x_{t+1}, s_{t+1}) = Phi(x_t, g_t, s_t) the optimiser's step,
    the solution map is u -> x_T(u). The steps are virtual: the level's variables are at x_T during the evaluation of an outer
    objective, and are restored bit for bit afterwards. So the hypergradient is the exact derivative of F(u, x_T(u)), with all
    evaluations on one batch of the level and one random state. The adjoint runs through the steps backwards,

        (a_x, a_g, lambda_s) <- Phi'(x_t, g_t, s_t)^T (lambda_x, lambda_s)
        lambda_x <- a_x + (d2f / dx2) a_g,    u_bar <- u_bar + (d2f / du dx) a_g

    with one product a step. A step moves only the parameters that its loss uses. If the level has a `clip`, Phi scales g_t down
    as the level's own steps do, and is differentiated through that.

    Args:
        steps: T.
        checkpoint_every: the interval, in steps, at which x_t and s_t are kept. The backward pass retakes the steps in between
            and holds the graphs of g_t of one interval. With 1, no step is retaken and all graphs are held. If None, the
            intervals need the least memory: that of about sqrt(2 T h) checkpoints if a graph takes that of h. They are longest
            for the first steps, since only few checkpoints are left when the backward pass comes there.
        products: "autograd", "forward" or "finite_difference".
        optimizer: a TorchOpt transformation, such as `torchopt.adam(1e-3)`, which starts without state each time; if None, the
            level's own optimiser, which must be torch.optim's SGD, Adam or AdamW, with its present hyperparameters. Inside
            `solve`, or if the level holds an optimiser instance, the steps also start from its present momenta.
            (If a gradient component may be exactly zero, TorchOpt's Adam needs an `eps_root`. TorchOpt does not differentiate its
            own clipping: give the level a `clip`.)
        data: batches of which each virtual step takes the next, with a gradient on that batch; if None, all steps are on the
            batch of the level.
        start: a level at whose variables the steps start, instead of the present ones; it has the same shapes, and the level's
            loss names it. It receives the adjoint at x_0, and the optimiser starts without state: this is MAML. If the level
            is stacked (`mlopt.stacked`), the start may have the shapes of one task; it receives the sum over the tasks.
        learning_rates: a level whose variables r multiply the steps, x_{t+1} = x_t + r (Phi(x_t) - x_t), one tensor r for each
            variable, in a shape that expands to its own: with an optimiser of learning rate 1, they are learning rates. The
            level's loss names it. The level's own steps in a run do not use it. Here and in `start`, a place such as "meta.rates"
            is a submodule of a level's module, so that one level can hold both.

    Raises:
        MissingDependencyError: TorchOpt is not installed.
        EstimatorError: `optimizer` is neither a TorchOpt transformation nor None.

    Source: Maclaurin et al. 2015 (arXiv 1502.03492); Franceschi et al. 2017 (arXiv 1703.01785); Finn et al. 2017 (arXiv
    1703.03400) for `start`; Li et al. 2017 (arXiv 1707.09835) for `learning_rates`.

    Example:
        >>> from functools import partial
        >>> def loss(module, batch, *, outer):
        ...     return (module() - outer()).square().sum() / 2
        >>> problem = mlopt.Problem(
        ...     mlopt.Level("outer", mlopt.variables(torch.ones(1)), lambda module, batch, *, inner: inner().sum()),
        ...     mlopt.Level(
        ...         "inner",
        ...         mlopt.variables(torch.zeros(1)),
        ...         loss,
        ...         optimizer=partial(torch.optim.SGD, lr=0.5),
        ...         estimator=mlopt.Unrolled(steps=2),
        ...     ),
        ... )
        >>> mlopt.hypergradient(problem).gradient["value"]  # of x_2 = (1 - 0.5^2) u
        tensor([0.7500])
    """

    needs_optimizer: ClassVar[bool] = True

    steps: int = attrs.field(default=10, validator=at_least(1))
    checkpoint_every: int | None = attrs.field(default=None, validator=_whole_or_none)
    products: str = attrs.field(default="autograd", validator=one_of(*_EXACT))
    optimizer: Any = attrs.field(default=None)
    data: Iterable[Any] | None = attrs.field(default=None, validator=batches_or_none, repr=False)
    start: str | None = attrs.field(default=None)
    learning_rates: str | None = attrs.field(default=None)

    def __attrs_post_init__(self) -> None:
        check_transformation(self.optimizer)

    @property
    def curvature_data(self) -> Iterable[Any] | None:
        return self.data

    @property
    def curvature_batches(self) -> int:
        return self.steps if self.data is not None else 1

    @property
    def references(self) -> tuple[str, ...]:
        return tuple(level_of(place) for place in (self.start, self.learning_rates) if place is not None)

    @contextlib.contextmanager
    def at_solution(self, point: Point, level: str) -> Iterator[None]:
        self._refuse_levels_inside(point, level)
        with restored(point.problem[level].parameters) as present:
            with point.generators_preserved():
                point.ahead[level] = _taken(self, point, level, present)
            try:
                yield
            finally:
                # The trajectory refers to the point: kept there, both would wait for the garbage collector.
                del point.ahead[level]

    def linearize(self, point: Point, level: str) -> Linearization:
        self._refuse_levels_inside(point, level)
        return _Unrolling(self, point, level)

    def cost(self, size: LevelSize) -> PullbackCost | None:
        return unrolled_cost(self.steps, self.checkpoint_every, size)

    def __str__(self) -> str:
        start = f" from {self.start}" if self.start else ""
        rates = f" at learning rates {self.learning_rates}" if self.learning_rates else ""
        return f"{self.steps} unrolled step{'s' * (self.steps != 1)}{start}{rates} with {self.products} products"


class _Unrolling(Linearization):
    """The derivative of u -> x_T(u)."""

    def __init__(self, rule: Unrolled, point: Point, name: str) -> None:
        self._rule, self._point, self._name = rule, point, name
        self.blocks, self.arguments = (name,), point.problem.graph[name].arguments
        self.report = Report(estimator=str(rule))

    def pullback(self, cotangent: Vectors, wanted: Sequence[str] | None = None) -> dict[Block, Tensors]:
        wanted = self.arguments if wanted is None else wanted
        values = self._point.values
        pulled: dict[Block, Tensors] = {argument: zeros_like(values[argument]) for argument in wanted}
        adjoint = cotangent.get(self._name, ())
        size = float(norm(adjoint))
        if not pulled or size == 0.0:
            return pulled
        trajectory: Trajectory | None = self._point.ahead.get(self._name)
        if trajectory is not None:
            adjoint = self._pull(trajectory, adjoint, pulled)
        else:
            with restored(values[self._name]) as present:
                trajectory = _taken(self._rule, self._point, self._name, present)
                adjoint = self._pull(trajectory, adjoint, pulled)
        if (start := trajectory.start) is not None:
            pairs = zip(adjoint, start.variables, strict=True)
            start.add_into(pulled, tuple((a if a.dim() == x.dim() else a.sum(0)).to(x) for a, x in pairs))
        self._record(float(norm(adjoint)) / size)
        return pulled

    def _pull(self, trajectory: Trajectory, adjoint: Tensors, pulled: dict[Block, Tensors]) -> Tensors:
        """Return the adjoint at x_0 for that at x_T, and add the cotangents on the arguments to `pulled`."""
        memory: Tensors = ()
        for held in trajectory.backwards():
            adjoint, along, memory, rates = trajectory.update.pull(held.step, adjoint, memory)
            if trajectory.rates is not None:
                trajectory.rates.add_into(pulled, rates)
            product = self._product(held, along, tuple(pulled))
            adjoint = add(adjoint, product.pop(self._name))
            add_into(pulled, product)
            # The next step may have to be retaken, with its segment, and needs the memory.
            del held, along, product
        return adjoint

    def _product(self, held: Held, along: Tensors, wanted: Sequence[str]) -> dict[Block, Tensors]:
        """Return H a_g and the mixed products at x_t."""
        with standing_in(self._point, self._point.problem[self._name], held.leaves):
            total = held.products({self._name: along}, (self._name, *wanted))
        if held.products.step is not None:
            self.report.step = held.products.step
        for remark in held.products.remarks:
            self.report.doubt(remark)
        return total

    def _record(self, growth: float) -> None:
        self.report.iterations += self._rule.steps
        self.report.products += self._rule.steps
        if not growth < _DIVERGED:
            self.report.remarks = (
                *self.report.remarks,
                f"the adjoint grew by a factor of {growth:.3g} over {self._rule.steps} steps: they diverge, or nearly",
            )


def _taken(rule: Unrolled, point: Point, name: str, present: Tensors) -> Trajectory:
    """Take the virtual steps of an estimator from a copy of a level's present variables, or from its start."""
    start, rates = (
        None if place is None else Referred.of(place, option, point, name)
        for option, place in (("start", rule.start), ("learning_rates", rule.learning_rates))
    )
    return Trajectory(
        point,
        name,
        present,
        steps=rule.steps,
        every=rule.checkpoint_every,
        products=PRODUCTS[rule.products],
        optimizer=rule.optimizer,
        start=start,
        rates=rates,
    )
