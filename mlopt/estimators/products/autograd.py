"""Reverse mode over reverse mode."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ...problem import Block, Term, Vectors, cut, derivatives
from ...tensors import Tensors, zeros_like
from .kernels import differentiable_kernels, graph_of, is_search_due, refuse_once_differentiable, right_kernels
from .product import Product, name_kernels

__all__ = ["AutogradProduct", "Ends", "ends_of", "walk"]

#: Gradients with a graph, their positions among the vectors of a direction, and variables.
Ends: TypeAlias = tuple[list[Tensor], list[int], list[Tensor]]


class AutogradProduct(Product):
    """Reverse over reverse: the gradient's graph is traced once and kept, and each product is one walk through it."""

    def __init__(self, term: Term) -> None:
        super().__init__(term)
        self._gradients: dict[Block, Tensors] = {}
        #: By blocks, the tensors to differentiate and those to differentiate by; small levels take many products.
        self._ends: dict[tuple[tuple[Block, ...], tuple[Block, ...]], Ends] = {}

    @name_kernels
    def __call__(self, direction: Vectors, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        blocks = (tuple(direction), tuple(wanted))
        if blocks not in self._ends:
            mixed = self.term.mixed(direction, wanted, forward=False)
            if mixed is not None:
                return mixed
            self._trace([block for block in direction if block not in self._gradients])
            self._ends[blocks] = ends_of(self._gradients, direction, wanted, self.term.values)
        return walk(self._ends[blocks], direction, wanted, self.term.values)

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


def ends_of(gradients: Vectors, direction: Iterable[Block], wanted: Sequence[Block], values: Vectors) -> Ends:
    """Return the gradients by the blocks of a direction, which of them have a graph, and the variables of the wanted blocks."""
    outputs = [gradient for block in direction for gradient in gradients[block]]
    chosen = [k for k, gradient in enumerate(outputs) if gradient.requires_grad]
    return [outputs[k] for k in chosen], chosen, [variable for block in wanted for variable in values[block]]


def walk(ends: Ends, direction: Vectors, wanted: Sequence[Block], values: Vectors) -> dict[Block, Tensors]:
    """Return the derivatives of <gradients, direction> by the wanted blocks; the graph is kept."""
    outputs, chosen, inputs = ends
    if not outputs:
        return {block: zeros_like(values[block]) for block in wanted}
    vectors = [vector for block in direction for vector in direction[block]]
    flat = torch.autograd.grad(
        outputs,
        inputs,
        grad_outputs=[vectors[k] for k in chosen],
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return cut(flat, wanted, values)
