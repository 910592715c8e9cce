"""Forward mode over reverse mode, by torch.func."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import EstimatorError
from ...problem import Block, LevelTerm, Term, Vectors
from ...tensors import Tensors
from .kernels import differentiable_kernels, graph_of, prepare, refuse_once_differentiable
from .product import Product, name_kernels

__all__ = ["ForwardProduct"]


class ForwardProduct(Product):
    """Forward over reverse, torch.func.jvp over torch.func.grad: no memory is kept between products.

    (Reverse over forward would take fewer passes for a mixed product, but is wrong through batch, layer and instance norms:
    torch's forward mode takes their statistics to be constants.)
    """

    @name_kernels
    def __call__(self, direction: Vectors, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        live = prepare(self.term)
        with differentiable_kernels(self.term):
            mixed = self.term.mixed(direction, wanted, forward=True)
            if mixed is not None:
                return mixed
            start = {block: tuple(v.detach() for v in self.term.values[block]) for block in self.term.blocks}

            def gradient(moved: dict[Block, Tensors]) -> tuple[dict[Block, Tensors], Tensor]:
                point = {**start, **moved}
                at = torch.func.grad_and_value(lambda inner: self.term.function({**point, **inner}))
                gradients, value = at({block: point[block] for block in wanted})
                return dict(gradients), value

            along = {block: tuple(vectors) for block, vectors in direction.items()}
            origin = {block: start[block] for block in along}
            (_, value), (product, _) = torch.func.jvp(gradient, (origin,), (along,))[:2]
            verify(self.term, value, live[0] if live else None)
        # In float32, torch's forward mode takes a Python number times a scalar to float64.
        return {block: tuple(x.to(v) for x, v in zip(product[block], start[block], strict=True)) for block in wanted}


def verify(term: Term, value: Tensor, live: Tensor | None) -> None:
    """Raise if a level's loss as a pure function differs from its value on the live modules; compared once for each workspace.

    `live` is the value on the live modules, if it was evaluated already.

    torch.func draws masks in another order if dropout meets a tensor that is not contiguous, and it treats parameters from
    outside the modules as constants.
    """
    if not isinstance(term, LevelTerm) or (term.name, term.part) in term.workspace.verified:
        return
    live = term.value() if live is None else live
    refuse_once_differentiable(graph_of([live]))
    if not math.isfinite(live.item()):
        return  # reported elsewhere
    tolerance = torch.finfo(live.dtype).eps ** 0.5
    if not torch.allclose(value.detach().to(live), live.detach(), rtol=tolerance, atol=tolerance * 1e-3):
        raise EstimatorError(
            f"level {term.name!r}: its {term.part} is {value.item():.6g} under torch.func and {live.item():.6g} on the module: "
            "it draws other random numbers there (dropout of a transposed tensor), or uses parameters from outside the module; "
            "use products='autograd'"
        )
    term.workspace.verified.add((term.name, term.part))
