"""Forward-mode products with a level's Hessian, compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import EstimatorError
from ...problem import Block, LevelTerm, Vectors
from ...tensors import Tensors
from .forward import ForwardProduct
from .product import name_kernels, plain_attention

__all__ = ["CompiledProduct"]


class CompiledProduct(ForwardProduct):
    """`ForwardProduct`, with the product of a level's Hessian compiled by torch.compile; the first one takes seconds to minutes.

    The compiled function is kept with the problem, and compiled anew when the shapes of a batch change. Dropout draws the
    masks that it draws elsewhere.
    """

    @name_kernels
    def __call__(self, direction: Vectors, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        term = self.term
        if not isinstance(term, LevelTerm) or set(direction) != {term.name} or set(wanted) != {term.name}:
            return super().__call__(direction, wanted)
        # It takes as long to import as the rest of torch.
        from torch._dynamo.exc import TorchDynamoException

        key = (term.name, term.part)
        if key not in term.compiled:
            term.compiled[key] = _compile(term)
        with plain_attention():
            try:
                product: Tensors = term.compiled[key](*term.own_arguments(), tuple(direction[term.name]))
            except TorchDynamoException as error:
                raise EstimatorError(
                    f"level {term.name!r}: torch.compile does not take its {term.part} "
                    f"({str(error).strip().splitlines()[0]}); use compile=False"
                ) from error
        return {term.name: product}


def _compile(term: LevelTerm) -> Callable[..., Tensors]:
    function = term.own_function()

    def product(own: Tensors, rest: Mapping[str, Tensor], batch: Any, along: Tensors) -> Tensors:
        def loss(moved: Tensors) -> Tensor:
            return function(moved, rest, batch)

        found: Tensors = torch.func.jvp(torch.func.grad(loss), (own,), (along,))[1]
        return found

    # The generators that eager code draws from: all products of a pullback, and the training step, see the same masks.
    compiled: Callable[..., Tensors] = torch.compile(product, fullgraph=True, options={"fallback_random": True})
    return compiled
