"""Unrolled differentiation: the solution is the end of some optimiser steps, and its pullback is the adjoint of the steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from ..errors import EstimatorError, NonFiniteError
from ..problem import (
    Block,
    Estimator,
    LevelSize,
    Linearization,
    Objective,
    Point,
    PullbackCost,
    Report,
    Vectors,
    add_into,
    restored,
    standing_in,
    to_device,
    used_derivatives,
)
from ..tensors import Tensors, add, is_finite, norm, zeros_like
from ..validation import at_least, batches_or_none, is_whole, must_be, one_of
from .cost import unrolled_cost
from .optimizer_step import OptimizerStep, Step, check_transformation
from .products import PRODUCTS, SecondDerivatives
from .products.kernels import graph_of
from .referred import Referred, level_of
from .segments import balanced, bytes_of, saved, uniform

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
                point.ahead[level] = _Trajectory(self, point, level, present)
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
        trajectory: _Trajectory | None = self._point.ahead.get(self._name)
        if trajectory is not None:
            adjoint = self._pull(trajectory, adjoint, pulled)
        else:
            with restored(values[self._name]) as present:
                trajectory = _Trajectory(self._rule, self._point, self._name, present)
                adjoint = self._pull(trajectory, adjoint, pulled)
        if (start := trajectory.start) is not None:
            pairs = zip(adjoint, start.variables, strict=True)
            start.add_into(pulled, tuple((a if a.dim() == x.dim() else a.sum(0)).to(x) for a, x in pairs))
        self._record(float(norm(adjoint)) / size)
        return pulled

    def _pull(self, trajectory: _Trajectory, adjoint: Tensors, pulled: dict[Block, Tensors]) -> Tensors:
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

    def _product(self, held: _Held, along: Tensors, wanted: Sequence[str]) -> dict[Block, Tensors]:
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


@attrs.frozen(eq=False)
class _Held:
    """A step that the adjoint has not passed yet, with leaves at x_t and products there."""

    step: Step
    leaves: tuple[nn.Parameter, ...]
    products: SecondDerivatives


class _Trajectory:
    """x_0, x_1, ..., x_T: the constructor takes the steps and leaves the live variables at x_T; `backwards` retraces them.

    Args:
        rule: the estimator.
        point: the point.
        name: the level.
        present: a copy of its variables.

    Attributes:
        update: Phi.
        start: the variables at which the steps start; None for the present ones.
        rates: the factors on the steps, if there are any.
    """

    update: OptimizerStep

    def __init__(self, rule: Unrolled, point: Point, name: str, present: Tensors) -> None:
        self._rule, self._point, self._level = rule, point, point.problem[name]
        self._live = self._level.parameters
        self.start, self.rates = self._referred("start"), self._referred("learning_rates")
        variables = present if self.start is None else self._start_from(self.start)
        _put(self._live, variables)
        value = self._objective(0).value()
        measured = rule.checkpoint_every is None and rule.steps > 1
        traced = self._traced_bytes(value, variables) if measured else 0
        first = self._gradient(value)
        #: The gradient at x_0 on the live variables, until it was compared with that on leaves.
        self._first: Sequence[Tensor | None] = first
        rates = () if self.rates is None else self._rates(self.rates)
        expected: list[tuple[int, ...]] = []
        #: By step, the variables that the loss uses; None once the steps are known to move these and no others.
        self._uses: list[tuple[int, ...]] | None = [_used(first)] * rule.steps
        while self._uses != expected:
            # The steps are taken again if one used others than the first: each pass settles one more step, and most settle all.
            assert self._uses is not None
            expected = [*self._uses]
            self.update = OptimizerStep(
                rule.optimizer, point, name, expected, fresh=self.start is not None, rates=rates
            )
            last = self._walk_all(variables, traced)
        self._uses, variables = None, last
        if not is_finite(variables):
            raise NonFiniteError(
                f"level {name!r}: {rule.steps} virtual steps led to variables that are not finite; take fewer or shorter steps"
            )
        _put(self._live, variables)

    def _walk_all(self, variables: Tensors, traced: int) -> Tensors:
        """Take all steps from x_0, keep the checkpoints and the last segment, and return x_T."""
        memory = self.update.initial
        self._lengths = self._segments(variables, memory, traced)
        self._kept: list[tuple[int, Tensors, Tensors]] = []
        self._segment: list[_Held] = []
        begin = 0
        for length in self._lengths:
            self._kept.append((begin, variables, memory))
            begin += length
            variables, memory = self._walk(self._segment if begin == self._rule.steps else None)
        return variables

    def _traced_bytes(self, value: Tensor, variables: Tensors) -> int:
        """Return the bytes that the trace of a gradient holds, without those that it shares with the graph of `value`."""
        standing = saved(graph_of([value])).keys()
        leaves = _leaves(variables)
        _, products = self._trace(0, leaves)
        own = saved(products.graph())
        for shared in (*standing, *(x.untyped_storage().data_ptr() for x in leaves)):
            own.pop(shared, None)
        # The processes have different rows, and must retake the same steps.
        return int(self._point.problem.ranks.most([sum(own.values())])[0])

    def _segments(self, variables: Tensors, memory: Tensors, traced: int) -> list[int]:
        steps, every = self._rule.steps, self._rule.checkpoint_every
        if every is not None:
            # The steps since the last checkpoint are held from the first.
            return uniform(steps, steps if every == 1 else every)
        point = bytes_of(variables)
        checkpoint = point + bytes_of(memory)
        held = traced + (point if self.update.is_linear else point + checkpoint)
        return balanced(steps, held / max(checkpoint, 1))

    def _walk(self, segment: list[_Held] | None) -> tuple[Tensors, Tensors]:
        """Take the steps from the last checkpoint to the next, append them to `segment` if given, and return the end point."""
        begin, variables, memory = self._kept[-1]
        for t in range(begin, begin + self._lengths[len(self._kept) - 1]):
            leaves = _leaves(variables)
            if segment is None:
                derivatives = self._gradient_on(t, leaves)
                pairs = zip(derivatives, variables, strict=True)
                gradient = tuple(torch.zeros_like(x) if g is None else g for g, x in pairs)
                if self._uses is not None:
                    self._uses[t] = _used(derivatives)
            else:
                gradient, products = self._trace(t, leaves)
                if self._uses is not None and not self._moves(self._uses[t], gradient):
                    self._uses[t] = _used(self._gradient_on(t, leaves))
            if t == 0 and self._first:
                self._check(gradient)
            step = Step(t, variables, gradient, memory)
            with torch.no_grad():
                variables, memory = self.update(step)
            if segment is not None:
                products.forget_gradient()
                segment.append(_Held(Step(t, (), (), ()) if self.update.is_linear else step, leaves, products))
            del gradient, step
        return variables, memory

    def _gradient_on(self, t: int, leaves: tuple[nn.Parameter, ...]) -> tuple[Tensor | None, ...]:
        with standing_in(self._point, self._level, leaves):
            return self._gradient(self._objective(t).value())

    @staticmethod
    def _moves(used: Sequence[int], gradient: Tensors) -> bool:
        """Return True if a gradient is not zero for exactly the variables that are used, which a trace does not tell apart."""
        sizes = torch.stack([size.float() for size in torch._foreach_norm(list(gradient), ord=1)]).tolist()
        return [i for i, size in enumerate(sizes) if size != 0.0] == [*used]

    def _trace(self, t: int, leaves: tuple[nn.Parameter, ...]) -> tuple[Tensors, SecondDerivatives]:
        """Trace the gradient at x_t on leaves of its own, since several steps are held at a time."""
        products = SecondDerivatives(self._objective(t), PRODUCTS[self._rule.products])
        with standing_in(self._point, self._level, leaves):
            return products.gradient(self._level.name), products

    def _check(self, gradient: Tensors) -> None:
        """Raise if leaves in place of the variables change the gradient: then the loss takes them from outside the module."""
        pairs = [(f, g) for f, g in zip(self._first, gradient, strict=True) if f is not None]
        self._first = ()
        noise = 1e3 * torch.finfo(gradient[0].dtype).eps * norm([f for f, _ in pairs])
        # One comparison of all of them, since each makes the host wait for the device.
        excess = [(f - g).norm().to(noise) - 0.01 * f.norm().to(noise) for f, g in pairs]
        if excess and bool((torch.stack(excess) > noise).any()):
            raise EstimatorError(
                f"level {self._level.name!r}: Unrolled evaluates its loss with other parameters in its module, and the gradient "
                "changed; the loss must take its parameters from the module argument, not from outside"
            )

    def _objective(self, t: int) -> Objective:
        """Return the objective of step t, on the batch of the level or on the step's own."""
        level, batches = self._level, self._point.curvature_batches.get(self._level.name)
        own = None if batches is None else {level.name: to_device(batches[t], level.device)}
        return Objective.of(level, self._point, own)

    def _gradient(self, value: Tensor) -> tuple[Tensor | None, ...]:
        return used_derivatives(value, self._point.values[self._level.name], self._point.problem.ranks)

    def backwards(self) -> Iterator[_Held]:
        """Yield the steps from the last to the first, and discard each; possible only once."""
        if not self._kept:
            raise EstimatorError(f"level {self._level.name!r}: its virtual steps were already pulled back through")
        while self._kept:
            if not self._segment:
                self._walk(self._segment)
            self._kept.pop()
            while self._segment:
                yield self._segment.pop()

    def _start_from(self, start: Referred) -> Tensors:
        own = [tuple(x.shape) for x in self._live]
        if start.shapes not in (own, [shape[1:] for shape in own]):
            raise EstimatorError(
                f"level {self._level.name!r}: Unrolled(start={self._rule.start!r}), whose parameters have shapes {start.shapes}, "
                f"not {own}; use modules of the same kind for both levels, of which this one may be stacked"
            )
        # Copies: differences move the variables of the start in place, too.
        pairs = zip(start.variables, self._live, strict=True)
        return tuple(x.detach().to(y).expand_as(y).clone(memory_format=torch.contiguous_format) for x, y in pairs)

    def _rates(self, rates: Referred) -> Tensors:
        own = [tuple(x.shape) for x in self._live]
        if len(own) != len(rates.shapes) or not all(map(_expands, rates.shapes, own)):
            raise EstimatorError(
                f"level {self._level.name!r}: Unrolled(learning_rates={self._rule.learning_rates!r}), whose parameters have "
                f"shapes {rates.shapes}, which do not expand to {own}; give one for each, of its shape or ()"
            )
        return tuple(rate.detach() for rate in rates.variables)

    def _referred(self, option: str) -> Referred | None:
        place: str | None = getattr(self._rule, option)
        return None if place is None else Referred.of(place, option, self._point, self._level.name)


def _used(derivatives: Sequence[Tensor | None]) -> tuple[int, ...]:
    return tuple(i for i, derivative in enumerate(derivatives) if derivative is not None)


def _expands(shape: tuple[int, ...], own: tuple[int, ...]) -> bool:
    """Return True if a tensor of one shape expands to another."""
    return len(shape) <= len(own) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(own), strict=False))


def _leaves(variables: Tensors) -> tuple[nn.Parameter, ...]:
    return tuple(nn.Parameter(x.detach()) for x in variables)


def _put(live: Tensors, values: Tensors) -> None:
    torch._foreach_copy_([variable.data for variable in live], list(values))
