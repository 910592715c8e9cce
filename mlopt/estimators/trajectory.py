"""The virtual steps of `Unrolled`: taken once forwards, and retraced segment by segment for the backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor, nn

from ..errors import EstimatorError, NonFiniteError
from ..problem import Objective, Point, standing_in, to_device
from ..tensors import Tensors, is_finite, norm
from .optimizer_step import OptimizerStep, Step
from .products import PRODUCTS, SecondDerivatives
from .products.kernels import graph_of
from .referred import Referred
from .segments import balanced, bytes_of, saved, uniform

if TYPE_CHECKING:
    from .unrolled import Unrolled

__all__ = ["Held", "Trajectory"]


@attrs.frozen(eq=False)
class Held:
    """A step that the adjoint has not passed yet, with leaves at x_t and products there."""

    step: Step
    leaves: tuple[nn.Parameter, ...]
    products: SecondDerivatives


class Trajectory:
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
        used = [i for i, g in enumerate(first) if g is not None]
        #: The gradient at x_0 on the live variables, until it was compared with that on leaves.
        self._first: Sequence[Tensor | None] = first
        rates = () if self.rates is None else self._rates(self.rates)
        self.update = OptimizerStep(rule.optimizer, point, name, used, fresh=self.start is not None, rates=rates)
        memory = self.update.initial
        self._lengths = self._segments(variables, memory, traced)
        self._kept: list[tuple[int, Tensors, Tensors]] = []
        self._segment: list[Held] = []
        begin = 0
        for length in self._lengths:
            self._kept.append((begin, variables, memory))
            begin += length
            variables, memory = self._walk(self._segment if begin == rule.steps else None)
        if not is_finite(variables):
            raise NonFiniteError(
                f"level {name!r}: {rule.steps} virtual steps led to variables that are not finite; take fewer or shorter steps"
            )
        _put(self._live, variables)

    def _traced_bytes(self, value: Tensor, variables: Tensors) -> int:
        """Return the bytes that the trace of a gradient holds, without those that it shares with the graph of `value`."""
        standing = saved(graph_of([value])).keys()
        leaves = _leaves(variables)
        _, products = self._trace(0, leaves)
        own = saved(products.graph())
        for shared in (*standing, *(x.untyped_storage().data_ptr() for x in leaves)):
            own.pop(shared, None)
        return sum(own.values())

    def _segments(self, variables: Tensors, memory: Tensors, traced: int) -> list[int]:
        steps, every = self._rule.steps, self._rule.checkpoint_every
        if every is not None:
            # The steps since the last checkpoint are held from the first.
            return uniform(steps, steps if every == 1 else every)
        point = bytes_of(variables)
        checkpoint = point + bytes_of(memory)
        held = traced + (point if self.update.is_linear else point + checkpoint)
        return balanced(steps, held / max(checkpoint, 1))

    def _walk(self, segment: list[Held] | None) -> tuple[Tensors, Tensors]:
        """Take the steps from the last checkpoint to the next, append them to `segment` if given, and return the end point."""
        begin, variables, memory = self._kept[-1]
        for t in range(begin, begin + self._lengths[len(self._kept) - 1]):
            leaves = _leaves(variables)
            if segment is None:
                with standing_in(self._point, self._level, leaves):
                    derivatives = self._gradient(self._objective(t).value())
                pairs = zip(derivatives, variables, strict=True)
                gradient = tuple(torch.zeros_like(x) if g is None else g for g, x in pairs)
            else:
                gradient, products = self._trace(t, leaves)
            if t == 0 and self._first:
                self._check(gradient)
            step = Step(t, variables, gradient, memory)
            with torch.no_grad():
                variables, memory = self.update(step)
            if segment is not None:
                products.forget_gradient()
                segment.append(Held(Step(t, (), (), ()) if self.update.is_linear else step, leaves, products))
            del gradient, step
        return variables, memory

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
        if not value.requires_grad:
            return (None,) * len(self._live)
        return torch.autograd.grad(value, self._point.values[self._level.name], allow_unused=True)

    def backwards(self) -> Iterator[Held]:
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
        return tuple(
            x.detach().to(own).expand_as(own).contiguous() for x, own in zip(start.variables, self._live, strict=True)
        )

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


def _expands(shape: tuple[int, ...], own: tuple[int, ...]) -> bool:
    """Return True if a tensor of one shape expands to another."""
    return len(shape) <= len(own) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(own), strict=False))


def _leaves(variables: Tensors) -> tuple[nn.Parameter, ...]:
    return tuple(nn.Parameter(x.detach()) for x in variables)


def _put(live: Tensors, values: Tensors) -> None:
    torch._foreach_copy_([variable.data for variable in live], list(values))
