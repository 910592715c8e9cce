"""Reverse mode over reverse mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from ...problem import Block, Term, Vectors, cut, derivatives
from ...tensors import Tensors, zeros_like
from .kernels import differentiable_kernels, graph_of, is_search_due, refuse_once_differentiable, right_kernels
from .product import Product, name_kernels

__all__ = ["AutogradProduct", "walk"]


class AutogradProduct(Product):
    """Reverse over reverse: the gradient's graph is traced once and kept, and each product is one walk through it."""

    traces: ClassVar[int] = 1

    def __init__(self, term: Term) -> None:
        super().__init__(term)
        self._gradients: dict[Block, Tensors] = {}
        #: In place of the gradients that were dropped, where they enter the graph; None for a constant.
        self._edges: dict[Block, tuple[GradientEdge | None, ...]] = {}

    @name_kernels
    def __call__(self, direction: Vectors, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        mixed = self.term.mixed(direction, wanted, forward=False)
        if mixed is not None:
            return mixed
        return self.term.together(wanted, lambda: self._piece(direction, wanted))

    def _piece(self, direction: Vectors, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        """Return the product with the piece of this process."""
        self._trace([block for block in direction if block not in self._gradients and block not in self._edges])
        sources = {block: self._edges.get(block) or self._gradients[block] for block in direction}
        return walk(sources, direction, wanted, self.term.values)

    @name_kernels
    def gradient(self, block: Block) -> Tensors:
        def evaluate() -> dict[Block, Tensors]:
            if block not in self._gradients:
                self._trace([block])
            return {block: tuple(g.detach() for g in self._gradients[block])}

        return self.term.together([block], evaluate)[block]

    def graph(self) -> set[Node]:
        return graph_of([gradient for vectors in self._gradients.values() for gradient in vectors])

    def forget_gradient(self) -> None:
        self._edges |= {block: _edges(vectors) for block, vectors in self._gradients.items()}
        self._gradients.clear()

    def known_gradient(self, block: Block) -> Tensors | None:
        return self.gradient(block) if block in self._gradients else None

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


def _edges(vectors: Tensors) -> tuple[GradientEdge | None, ...]:
    return tuple(get_gradient_edge(x) if x.requires_grad else None for x in vectors)


def walk(
    sources: Mapping[Block, Sequence[Tensor | GradientEdge | None]],
    direction: Vectors,
    wanted: Sequence[Block],
    values: Vectors,
) -> dict[Block, Tensors]:
    """Return the derivatives of <g, direction> by the wanted blocks; the graph is kept.

    Args:
        sources: g, by block: a gradient, or the edge at which it enters the graph; None for a constant.
        direction: the vectors, by block.
        wanted: the wanted blocks.
        values: the variables, by block.
    """
    pairs: list[tuple[Any, Tensor]] = [
        (source, vector)
        for block, vectors in direction.items()
        for source, vector in zip(sources[block], vectors, strict=True)
        if source is not None and (not isinstance(source, Tensor) or source.requires_grad)
    ]
    if not pairs:
        return {block: zeros_like(values[block]) for block in wanted}
    flat = torch.autograd.grad(
        [source for source, _ in pairs],
        [variable for block in wanted for variable in values[block]],
        grad_outputs=[vector for _, vector in pairs],
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return cut(flat, wanted, values)
