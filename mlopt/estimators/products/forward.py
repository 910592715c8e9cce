"""Forward mode, by torch.func."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from ...problem import Block, Vectors, derivatives
from ...tensors import Tensors
from .product import Product, name_kernels, plain_attention

__all__ = ["Forward"]


class Forward(Product):
    """Forward mode, torch.func.jvp, over or under reverse mode: nothing is kept from one product to the next.

    A product of a level's Hessian is taken forward over reverse. Where the blocks that are wanted are not among those of the
    direction, as in a mixed product, reverse over forward does with less: the derivative of the term along the direction is one
    forward-mode pass, and walking back from it to the wanted blocks visits only what depends on them.
    """

    @name_kernels
    def __call__(self, direction: Vectors, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        with plain_attention():
            mixed = self.term.mixed(direction, wanted, forward=True)
            if mixed is not None:
                return mixed
            start = {block: tuple(v.detach() for v in self.term.values[block]) for block in self.term.blocks}
            along = {block: tuple(vectors) for block, vectors in direction.items()}
            origin = {block: start[block] for block in along}
            if along.keys().isdisjoint(wanted):
                return self._reverse_over_forward(start, origin, along, wanted)

            def gradient(moved: dict[Block, Tensors]) -> dict[Block, Tensors]:
                point = {**start, **moved}
                at = torch.func.grad(lambda inner: self.term.function({**point, **inner}))
                return dict(at({block: point[block] for block in wanted}))

            product = torch.func.jvp(gradient, (origin,), (along,))[1]
        return {block: tuple(vectors) for block, vectors in product.items()}

    def _reverse_over_forward(
        self, start: Vectors, origin: dict[Block, Tensors], along: dict[Block, Tensors], wanted: Sequence[Block]
    ) -> dict[Block, Tensors]:
        leaves = {block: tuple(v.clone().requires_grad_() for v in start[block]) for block in wanted}
        point = {**start, **leaves}
        with _LinearLayersOnData():
            slope = torch.func.jvp(lambda moved: self.term.function({**point, **moved}), (origin,), (along,))[1]
        return derivatives(slope, wanted, leaves)


def _dual(tensor: Tensor) -> forward_ad.UnpackedDualTensor:
    pair: forward_ad.UnpackedDualTensor = forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
    return pair


class _LinearLayersOnData(TorchFunctionMode):
    """Forward mode through `torch.nn.functional.linear` at two matrix products where the input has no tangent.

    torch takes a tangent that is absent for one of zeros, and multiplies with it: a third product, in a network's widest layer.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.linear and not kwargs and _dual(args[0]).tangent is None:
            _, weight, *rest = args
            primal, tangent = _dual(weight)
            bias = _dual(rest[0]) if rest and rest[0] is not None else None
            if tangent is not None and (bias is None or bias.tangent is not None):
                value = func(args[0], primal, None if bias is None else bias.primal)
                moved = func(args[0], tangent, None if bias is None else bias.tangent)
                return forward_ad.make_dual(value, moved)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))
