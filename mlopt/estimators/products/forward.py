"""Forward mode over reverse mode, by torch.func."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import EstimatorError
from ...problem import Block, LevelTerm, Term, Vectors
from ...tensors import Tensors
from .product import Product, name_kernels, plain_attention, refuse_once_differentiable

__all__ = ["ForwardProduct"]


class ForwardProduct(Product):
    """Forward over reverse, torch.func.jvp over torch.func.grad: nothing is kept from one product to the next.

    (Reverse over forward would take fewer passes for a mixed product, and is wrong where torch's forward mode takes statistics
    for constants: through batch, layer and instance norms.)
    """

    @name_kernels
    def __call__(self, direction: Vectors, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        with plain_attention():
            mixed = self.term.mixed(direction, wanted, forward=True)
            if mixed is not None:
                return mixed
            start = {block: tuple(v.detach() for v in self.term.values[block]) for block in self.term.blocks}

            def gradient(moved: dict[Block, Tensors]) -> tuple[dict[Block, Tensors], Tensor]:
                point = {**start, **moved}
                at = torch.func.grad_and_value(lambda inner: self.term.function({**point, **inner}))
                found, value = at({block: point[block] for block in wanted})
                return dict(found), value

            along = {block: tuple(vectors) for block, vectors in direction.items()}
            origin = {block: start[block] for block in along}
            found, moved = torch.func.jvp(gradient, (origin,), (along,))[:2]
            verify(self.term, found[1])
            product = moved[0]
        return {block: tuple(vectors) for block, vectors in product.items()}


def verify(term: Term, value: Tensor) -> None:
    """Raise where a level's loss, as a pure function, is not what it is on the live modules; looked at once for each problem.

    torch.func draws masks in another order where dropout meets a tensor that is not contiguous, and parameters that a loss has
    from elsewhere than its modules are constants there.
    """
    if not isinstance(term, LevelTerm) or (term.name, term.part) in term.verified:
        return
    live = term.value()
    refuse_once_differentiable([live])
    if not math.isfinite(live.item()):
        return  # which is told elsewhere
    tolerance = torch.finfo(live.dtype).eps ** 0.5
    if not torch.allclose(value.detach().to(live), live.detach(), rtol=tolerance, atol=tolerance * 1e-3):
        raise EstimatorError(
            f"level {term.name!r}: under torch.func its {term.part} is {value.item():.6g}, and {live.item():.6g} on the module: "
            "it draws other random numbers there (dropout of a transposed tensor), or has parameters from outside the module; "
            "use products='autograd'"
        )
    term.verified.add((term.name, term.part))
