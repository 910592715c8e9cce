"""Reverse mode over reverse mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from ...problem import Block, Term, Vectors, cut, derivatives
from ...tensors import Tensors, zeros_like
from .kernels import differentiable_kernels, graph_of, is_search_due, refuse_once_differentiable, right_kernels
from .product import Product, name_kernels

__all__ = ["AutogradProduct", "edges_of", "walk"]

#: Where gradients enter their graph; None for a constant.
Edges: TypeAlias = tuple[GradientEdge | None, ...]
#: Such edges, and variables.
Ends: TypeAlias = tuple[Sequence[GradientEdge | None], list[Tensor]]


class AutogradProduct(Product):
    """Reverse over reverse: the gradient's graph is traced once and kept, and each product is one walk through it."""

    def __init__(self, term: Term) -> None:
        super().__init__(term)
        self._gradients: dict[Block, Tensors] = {}
        #: In place of the gradients that were dropped, where they enter the graph; None for a constant.
        self._edges: dict[Block, Edges] = {}
        #: By blocks, where products begin and end; small levels take many of them.
        self._ends: dict[tuple[tuple[Block, ...], tuple[Block, ...]], Ends] = {}

    @name_kernels
    def __call__(self, direction: Vectors, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        blocks = (tuple(direction), tuple(wanted))
        if blocks not in self._ends:
            mixed = self.term.mixed(direction, wanted, forward=False)
            if mixed is not None:
                return mixed
            self._trace([block for block in direction if block not in self._gradients and block not in self._edges])
            edges = [e for b in direction for e in self._edges.get(b) or edges_of(self._gradients[b])]
            self._ends[blocks] = edges, [variable for block in wanted for variable in self.term.values[block]]
        return walk(self._ends[blocks], direction, wanted, self.term.values)

    @name_kernels
    def gradient(self, block: Block) -> Tensors:
        if block not in self._gradients:
            self._trace([block])
        return tuple(g.detach() for g in self._gradients[block])

    def graph(self) -> set[Node]:
        return graph_of([gradient for vectors in self._gradients.values() for gradient in vectors])

    def forget_gradient(self) -> None:
        self._edges |= {block: edges_of(vectors) for block, vectors in self._gradients.items()}
        self._gradients.clear()

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


def edges_of(gradients: Tensors) -> Edges:
    """Return where gradients enter their graph; None for constants."""
    return tuple(get_gradient_edge(x) if x.requires_grad else None for x in gradients)


def walk(ends: Ends, direction: Vectors, wanted: Sequence[Block], values: Vectors) -> dict[Block, Tensors]:
    """Return the derivatives of <gradients, direction> by the wanted blocks; the graph is kept.

    Args:
        ends: where the gradients by the direction's blocks enter the graph, and the variables of the wanted blocks.
        direction: a vector for each gradient, by block.
        wanted: the blocks.
        values: the variables by block.
    """
    edges, variables = ends
    vectors = [vector for block in direction for vector in direction[block]]
    pairs = [(edge, vector) for edge, vector in zip(edges, vectors, strict=True) if edge is not None]
    if not pairs:
        return {block: zeros_like(values[block]) for block in wanted}
    flat = torch.autograd.grad(
        [edge for edge, _ in pairs],
        variables,
        grad_outputs=[vector for _, vector in pairs],
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return cut(flat, wanted, values)
