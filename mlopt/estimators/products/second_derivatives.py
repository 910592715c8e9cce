"""Products with the second derivatives of an objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.autograd.graph import Node

from ...problem import Block, Objective, Term, Vectors, add_into
from ...tensors import Tensors
from .product import Product
from .supplied import SuppliedProduct
from .verification import verified

__all__ = ["SecondDerivatives"]


class SecondDerivatives:
    """The sum, over the terms of an objective, of products with their second derivatives.

    Args:
        objective: the objective.
        kind: makes the product of a term.
    """

    #: The last finite-difference step, in units of the direction; None if none was taken.
    step: float | Tensor | None = None

    def __init__(self, objective: Objective, kind: Callable[[Term], Product]) -> None:
        self.products = [kind(t) if t.second_order is None else SuppliedProduct(t) for t in objective.terms]

    @property
    def remarks(self) -> list[str]:
        """Sentences about products that are in doubt."""
        return [remark for product in self.products for remark in product.remarks]

    def __call__(self, direction: Vectors, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        """Return the components d/dw <grad_D f, direction> for w in `wanted`; absent ones are zero."""
        total: dict[Block, Tensors] = {}
        for product in self.products:
            blocks = product.term.blocks
            along = {block: vectors for block, vectors in direction.items() if block in blocks}
            own = [block for block in wanted if block in blocks]
            if along and own and product.term.closed:
                add_into(total, product.term.product(along))
            elif along and own:
                add_into(total, verified(product, along, own))
                self.step = product.step if product.step is not None else self.step
        return total

    def gradient(self, block: Block) -> Tensors:
        """Return the objective's first derivative by a block, without a graph; what products need of it is kept."""
        total: dict[Block, Tensors] = {}
        for product in self.products:
            if block in product.term.blocks:
                add_into(total, {block: product.gradient(block)})
        return total[block]

    def graph(self) -> set[Node]:
        """Return the nodes of the graphs that the products keep."""
        return set().union(*(product.graph() for product in self.products))

    def forget_gradient(self) -> None:
        """Drop the value of the first derivative, and keep its graph, in which products are taken."""
        for product in self.products:
            product.forget_gradient()

    def known_gradient(self, block: Block) -> Tensors | None:
        """Return the objective's first derivative by a block if earlier products leave it behind; else None."""
        total: dict[Block, Tensors] = {}
        for product in self.products:
            if block in product.term.blocks:
                known = (
                    product.term.derivatives([block])[block] if product.term.closed else product.known_gradient(block)
                )
                if known is None:
                    return None
                add_into(total, {block: known})
        return total.get(block)
