"""Products that a regularizer supplies."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...errors import ProblemError
from ...problem import Block, Term, Vectors
from ...tensors import Tensors
from .product import Product

__all__ = ["SuppliedProduct"]


class SuppliedProduct(Product):
    """The products of a regularizer that has a method `product`, which takes no pass through autograd.

    They stand in for every kind of products, and are compared with differences of the regularizer's gradient as those are.

    Args:
        term: the term of a regularizer whose `second_order` is not None.
    """

    def __init__(self, term: Term) -> None:
        super().__init__(term)
        assert term.second_order is not None
        self._supplied = term.second_order

    def __call__(self, direction: Vectors, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        product = self._supplied(direction, wanted)
        values = self.term.values
        total: dict[Block, Tensors] = {}
        for block in wanted:
            given = product.get(block)
            pieces = (None,) * len(values[block]) if given is None else tuple(given)
            fits = len(pieces) == len(values[block]) and all(
                piece is None or piece.shape == x.shape for piece, x in zip(pieces, values[block], strict=True)
            )
            if not fits:
                raise ProblemError(
                    f"the product of the regularizer of level {self.term.label[0]!r} does not have the shapes of the variables "
                    f"of level {block!r}; return a tensor for each of them, or None for zero"
                )
            pairs = zip(pieces, values[block], strict=True)
            total[block] = tuple(torch.zeros_like(x, requires_grad=False) if p is None else p for p, x in pairs)
        return total
