"""Products of a term's second derivatives with vectors: one symmetric product, three ways to evaluate it."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import SecondDerivativeError
from ..problem import Block, Term, Vectors, cut, derivatives
from ..tensors import Tensors, axpy, norm, scale, subtract, zeros_like

__all__ = ["PRODUCTS", "Autograd", "FiniteDifference", "Forward", "Product"]

P = ParamSpec("P")
T = TypeVar("T")


#: What torch says where a second derivative, or a transform of torch.func, meets something that has none.
_COMPLAINTS = (
    "derivative for",
    "forward AD",
    "double backward",
    "twice differentiable",
    "saved tensor hooks",
    "setup_context",
    "once_differentiable",
)


def name_kernels(function: Callable[P, T]) -> Callable[P, T]:
    """Turn torch's complaint about a kernel without a second derivative into an error that names the remedy."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            text = str(error)
            if any(phrase in text for phrase in _COMPLAINTS):
                raise SecondDerivativeError(
                    f"a kernel in the loss has no second derivative ({text.splitlines()[0]}); use "
                    "products='finite_difference', or a kernel that has one (for attention, attn_implementation='eager')"
                ) from error
            raise

    return wrapped


class Product(ABC):
    """Products with the second derivatives of one term L at one point.

    With D the blocks of the direction and W those that are wanted, the product has the components
    d/dw <grad_D L, direction> for w in W. Every product in the library is of this kind: H q has D = W = {the level},
    the mixed product D = {the level}, W = {its arguments}, and a pushforward the other way round.

    Args:
        term: the term.
    """

    #: The last finite-difference step, in units of the direction; None where none is taken.
    step: float | None = None

    def __init__(self, term: Term) -> None:
        self.term = term

    @abstractmethod
    def __call__(self, direction: Vectors, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        """Return the product by wanted block. `direction` and `wanted` hold blocks of the term only."""


class Autograd(Product):
    """Reverse over reverse: the gradient's graph is traced once and kept, and each product is one walk through it."""

    def __init__(self, term: Term) -> None:
        super().__init__(term)
        self._value: Tensor | None = None
        self._gradients: dict[Block, Tensors] = {}

    @name_kernels
    def __call__(self, direction: Vectors, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        mixed = self.term.mixed(direction, wanted, forward=False)
        if mixed is not None:
            return mixed
        self._trace([block for block in direction if block not in self._gradients])
        pairs = [
            (gradient, vector)
            for block, vectors in direction.items()
            for gradient, vector in zip(self._gradients[block], vectors, strict=True)
            if gradient.requires_grad
        ]
        values = self.term.values
        if not pairs:
            return {block: zeros_like(values[block]) for block in wanted}
        flat = torch.autograd.grad(
            [gradient for gradient, _ in pairs],
            [variable for block in wanted for variable in values[block]],
            grad_outputs=[vector for _, vector in pairs],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return cut(flat, wanted, values)

    def _trace(self, blocks: Sequence[Block]) -> None:
        if not blocks:
            return
        # Fused attention has no second derivative; the plain kernel has.
        with sdpa_kernel(SDPBackend.MATH):
            if self._value is None:
                self._value = self.term.value()
            found = derivatives(self._value, blocks, self.term.values, traced=True)
        _refuse_once_differentiable(found)
        self._gradients |= found


def _refuse_once_differentiable(gradients: Vectors) -> None:
    """Raise where a gradient's graph holds the node that a backward marked `once_differentiable` leaves.

    Products walk around it where they can, as if that part of the second derivative were zero.
    """
    pending = [g.grad_fn for vectors in gradients.values() for g in vectors if g.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if node.name() in ("DelayedError", "Error", "torch::autograd::DelayedError", "torch::autograd::Error"):
            raise RuntimeError("a custom autograd.Function is marked once_differentiable")
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)


class Forward(Product):
    """Forward over reverse, torch.func.jvp over torch.func.grad: nothing is kept from one product to the next."""

    @name_kernels
    def __call__(self, direction: Vectors, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        with sdpa_kernel(SDPBackend.MATH):
            mixed = self.term.mixed(direction, wanted, forward=True)
            if mixed is not None:
                return mixed
            start = {block: tuple(v.detach() for v in self.term.values[block]) for block in self.term.blocks}

            def gradient(moved: dict[Block, Tensors]) -> dict[Block, Tensors]:
                point = {**start, **moved}
                at = torch.func.grad(lambda inner: self.term.function({**point, **inner}))
                return dict(at({block: point[block] for block in wanted}))

            along = {block: tuple(vectors) for block, vectors in direction.items()}
            product = torch.func.jvp(gradient, ({block: start[block] for block in along},), (along,))[1]
        return {block: tuple(vectors) for block, vectors in product.items()}


#: Relative size of a finite-difference displacement, ||step * direction|| / ||variables||. Central differences err by
#: the square of it and by rounding over it; measured on small networks, 1e-2 is off by 12% in float32 and 1e-3 by under 1%.
_RELATIVE_STEP = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


class FiniteDifference(Product):
    """Central differences of first derivatives: works with every kernel, activation checkpointing and sharded parameters."""

    def __call__(self, direction: Vectors, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        moved = [variable for block in direction for variable in self.term.values[block]]
        along = [vector for block in direction for vector in direction[block]]
        size = float(norm(along))
        if size == 0.0:
            return {block: zeros_like(self.term.values[block]) for block in wanted}
        relative = max(_RELATIVE_STEP.get(variable.dtype, 1e-3) for variable in moved)
        step = relative * max(1.0, float(norm([v.detach() for v in moved]))) / size
        self.step = step
        live = [variable.data for variable in moved]
        kept = [variable.clone() for variable in live]
        try:
            torch._foreach_copy_(live, list(axpy(step, along, kept)))
            above = self.term.derivatives(wanted)
            torch._foreach_copy_(live, list(axpy(-step, along, kept)))
            below = self.term.derivatives(wanted)
        finally:
            torch._foreach_copy_(live, kept)
        return {block: scale(0.5 / step, subtract(above[block], below[block])) for block in wanted}


#: The ways to evaluate products, by the name that estimators take.
PRODUCTS: dict[str, type[Product]] = {"autograd": Autograd, "forward": Forward, "finite_difference": FiniteDifference}
