"""Reverse mode over reverse mode."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...problem import Block, Term, Vectors, cut, derivatives
from ...tensors import Tensors, zeros_like
from .kernels import differentiable_kernels, graph_of, is_search_due, refuse_once_differentiable, right_kernels
from .product import Product, name_kernels

__all__ = ["AutogradProduct", "walk"]


class AutogradProduct(Product):
    """Reverse over reverse: the gradient's graph is traced once and kept, and each product is one walk through it."""

    def __init__(self, term: Term) -> None:
        super().__init__(term)
        self._gradients: dict[Block, Tensors] = {}

    @name_kernels
    def __call__(self, direction: Vectors, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        mixed = self.term.mixed(direction, wanted, forward=False)
        if mixed is not None:
            return mixed
        self._trace([block for block in direction if block not in self._gradients])
        return walk(self._gradients, direction, wanted, self.term.values)

    @name_kernels
    def gradient(self, block: Block) -> Tensors:
        if block not in self._gradients:
            self._trace([block])
        return tuple(g.detach() for g in self._gradients[block])

    def known_gradient(self, block: Block) -> Tensors | None:
        return tuple(g.detach() for g in self._gradients[block]) if block in self._gradients else None

    def _trace(self, blocks: Sequence[Block]) -> None:
        if not blocks:
            return
        while True:
            with differentiable_kernels(self.term):
                value = self.term.value()
                gradients = derivatives(value, blocks, self.term.values, traced=True)
            if not is_search_due(self.term):
                break
            # Both graphs are searched: a node can be in that of the value alone.
            graph = graph_of([value, *(g for vectors in gradients.values() for g in vectors)])
            refuse_once_differentiable(graph)
            if right_kernels(self.term, graph):
                break
        self._gradients |= gradients


def walk(gradients: Vectors, direction: Vectors, wanted: Sequence[Block], values: Vectors) -> dict[Block, Tensors]:
    """Return the derivatives of <gradients, direction> by the wanted blocks; the graph is kept."""
    pairs = [
        (gradient, vector)
        for block, vectors in direction.items()
        for gradient, vector in zip(gradients[block], vectors, strict=True)
        if gradient.requires_grad
    ]
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
