"""The trajectory of a level's virtual steps: taken forwards, kept at checkpoints, and retraced backwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from ..errors import EstimatorError, NonFiniteError
from ..problem import Objective, Point, standing_in, to_device, used_derivatives
from ..tensors import Tensors, is_finite, norm
from .optimizer_step import OptimizerStep, Step
from .products import Product, SecondDerivatives
from .products.kernels import graph_of
from .referred import Referred
from .segments import balanced, bytes_of, saved, uniform

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
        point: the point.
        name: the level.
        present: a copy of its variables.
        steps: T.
        every: the interval, in steps, of the checkpoints; None for the intervals that need the least memory.
        products: the kind of products.
        optimizer: a TorchOpt transformation; the level's own optimiser if None.
        start: the variables at which the steps start; None for the present ones.
        rates: the factors on the steps, if there are any.

    Attributes:
        update: Phi.
        start: as given.
        rates: as given.
    """

    update: OptimizerStep

    def __init__(
        self,
        point: Point,
        name: str,
        present: Tensors,
        *,
        steps: int,
        every: int | None,
        products: type[Product],
        optimizer: Any,
        start: Referred | None,
        rates: Referred | None,
    ) -> None:
        self._point, self._level, self._products = point, point.problem[name], products
        self._steps, self._every, self.start, self.rates = steps, every, start, rates
        self._live = self._level.parameters
        variables = present if start is None else start.as_start(self._live)
        _put(self._live, variables)
        value = self._objective(0).value()
        measured = every is None and steps > 1
        traced = self._traced_bytes(value, variables) if measured else 0
        first = self._gradient(value)
        #: The gradient at x_0 on the live variables, until it was compared with that on leaves.
        self._first: Sequence[Tensor | None] = first
        factors = () if rates is None else rates.as_rates(self._live)
        expected: list[tuple[int, ...]] = []
        #: By step, the variables that the loss uses; None once the steps are known to move these and no others.
        self._uses: list[tuple[int, ...]] | None = [_used(first)] * steps
        while self._uses != expected:
            # The steps are taken again if one used others than the first: each pass settles one more step, and most settle all.
            assert self._uses is not None
            expected = [*self._uses]
            self.update = OptimizerStep(optimizer, point, name, expected, fresh=start is not None, rates=factors)
            last = self._walk_all(variables, traced)
        self._uses, variables = None, last
        if not is_finite(variables):
            raise NonFiniteError(
                f"level {name!r}: {steps} virtual steps led to variables that are not finite; take fewer or shorter steps"
            )
        _put(self._live, variables)

    def _walk_all(self, variables: Tensors, traced: int) -> Tensors:
        """Take all steps from x_0, keep the checkpoints and the last segment, and return x_T."""
        memory = self.update.initial
        self._lengths = self._segments(variables, memory, traced)
        self._kept: list[tuple[int, Tensors, Tensors]] = []
        self._segment: list[Held] = []
        begin = 0
        for length in self._lengths:
            self._kept.append((begin, variables, memory))
            begin += length
            variables, memory = self._walk(self._segment if begin == self._steps else None)
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
        steps, every = self._steps, self._every
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
                segment.append(Held(Step(t, (), (), ()) if self.update.is_linear else step, leaves, products))
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
        products = SecondDerivatives(self._objective(t), self._products)
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


def _used(derivatives: Sequence[Tensor | None]) -> tuple[int, ...]:
    return tuple(i for i, derivative in enumerate(derivatives) if derivative is not None)


def _leaves(variables: Tensors) -> tuple[nn.Parameter, ...]:
    return tuple(nn.Parameter(x.detach()) for x in variables)


def _put(live: Tensors, values: Tensors) -> None:
    torch._foreach_copy_([variable.data for variable in live], list(values))
