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
from .kernels import differentiable_kernels, prepare, uses_primitives
from .product import name_kernels

__all__ = ["CompiledProduct"]


class CompiledProduct(ForwardProduct):
    """`ForwardProduct` with a compiled product of a level's Hessian; the first call takes seconds to minutes.

    The compiled function is kept in the workspace, and compiled again when the shapes of a batch change. Dropout draws the
    same masks as in eager code.
    """

    @name_kernels
    def __call__(self, direction: Vectors, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        term = self.term
        if not isinstance(term, LevelTerm) or set(direction) != {term.name} or set(wanted) != {term.name}:
            return super().__call__(direction, wanted)
        prepare(term)
        if uses_primitives(term):
            # torch.compile does not apply a function mode within the transforms of torch.func (torch 2.13).
            return super().__call__(direction, wanted)
        # Imported here since the import takes as long as the rest of torch.
        from torch._dynamo.exc import TorchDynamoException

        key = (term.name, term.part)
        compiled = term.workspace.compiled
        if key not in compiled:
            compiled[key] = _compile(term)
        with differentiable_kernels(term):
            try:
                product: Tensors = compiled[key](*term.own_arguments(), tuple(direction[term.name]))
            except TorchDynamoException as error:
                raise EstimatorError(
                    f"level {term.name!r}: torch.compile cannot compile its {term.part} "
                    f"({str(error).strip().splitlines()[0]}); use compile=False"
                ) from error
        return {term.name: product}


def _compile(term: LevelTerm) -> Callable[..., Tensors]:
    function = term.own_function()

    def product(own: Tensors, rest: Mapping[str, Tensor], batch: Any, along: Tensors) -> Tensors:
        def loss(moved: Tensors) -> Tensor:
            return function(moved, rest, batch)

        image = torch.func.jvp(torch.func.grad(loss), (own,), (along,))[1]
        return tuple(x.to(v) for x, v in zip(image, own, strict=True))

    # Random numbers come from eager generators: all products of a pullback, and the training step, see the same masks.
    compiled: Callable[..., Tensors] = torch.compile(product, fullgraph=True, options={"fallback_random": True})
    return compiled
