"""Forward mode over reverse mode, by torch.func."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import EstimatorError
from ...problem import Block, LevelTerm, Term, Vectors
from ...tensors import Tensors
from .kernels import differentiable_kernels, graph_of, prepare, refuse_once_differentiable
from .product import Product, name_kernels

__all__ = ["ForwardProduct"]

#: Torch has one level of forward mode in a process: two threads that enter it at once destroy each other's tangents.
_FORWARD_MODE = threading.RLock()


class ForwardProduct(Product):
    """Forward over reverse, torch.func.jvp over torch.func.grad: no memory is kept between products.

    (Reverse over forward would take fewer passes for a mixed product, but is wrong through batch, layer and instance norms:
    torch's forward mode takes their statistics to be constants.)
    """

    evaluations: ClassVar[int] = 1

    def __init__(self, term: Term) -> None:
        super().__init__(term)
        _refuse_hooks(term)
        #: The first derivatives at which products were taken, by block that was moved.
        self._gradients: dict[Block, Tensors] = {}

    @name_kernels
    def __call__(self, direction: Vectors, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        live = prepare(self.term)
        with _FORWARD_MODE, differentiable_kernels(self.term):
            mixed = self.term.mixed(direction, wanted, forward=True)
        if mixed is not None:
            return mixed
        return self.term.together(wanted, lambda: self._piece(direction, wanted, live[0] if live else None))

    def _piece(self, direction: Vectors, wanted: Sequence[Block], live: Tensor | None) -> dict[Block, Tensors]:
        """Return the product with the piece of this process; `live` is its value, if it was evaluated already."""
        with _FORWARD_MODE, differentiable_kernels(self.term):
            start = {block: tuple(v.detach() for v in self.term.values[block]) for block in self.term.blocks}

            def gradient(moved: dict[Block, Tensors]) -> tuple[dict[Block, Tensors], Tensor]:
                point = {**start, **moved}
                at = torch.func.grad_and_value(lambda inner: self.term.function({**point, **inner}))
                gradients, value = at({block: point[block] for block in wanted})
                return dict(gradients), value

            along = {block: tuple(vectors) for block, vectors in direction.items()}
            origin = {block: start[block] for block in along}
            (present, value), (product, _) = torch.func.jvp(gradient, (origin,), (along,))[:2]
            verify(self.term, value, live)
            self._gradients |= {block: present[block] for block in wanted if block in direction}
        # In float32, torch's forward mode takes a Python number times a scalar to float64.
        return {block: tuple(x.to(v) for x, v in zip(product[block], start[block], strict=True)) for block in wanted}

    def known_gradient(self, block: Block) -> Tensors | None:
        if block not in self._gradients:
            return None
        return self.term.together([block], lambda: {block: self._gradients[block]})[block]


def _refuse_hooks(term: Term) -> None:
    """Raise if a variable has a hook: torch.func differentiates by other tensors, which have none."""
    for block in term.blocks:
        for k, variable in enumerate(term.values[block]):
            if variable._backward_hooks:
                raise EstimatorError(
                    f"level {block!r}: variable {k} of shape {tuple(variable.shape)} has a hook (register_hook), which "
                    "products='forward' do not run; use products='autograd'"
                )


def verify(term: Term, value: Tensor, live: Tensor | None) -> None:
    """Raise if a level's loss as a pure function differs from its value on the live modules; compared once for each workspace.

    `live` is the value on the live modules, if it was evaluated already.

    torch.func draws masks in another order if dropout meets a tensor that is not contiguous, and it treats parameters from
    outside the modules as constants.
    """
    if not isinstance(term, LevelTerm) or ("forward", *term.label) in term.workspace.verified:
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
    term.workspace.verified.add(("forward", *term.label))
