"""The stationarity conditions of a level and of the levels inside it as one linear system."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ..linear import MatVec
from ..problem import Block, Vectors, cut
from ..tensors import Tensors

__all__ = ["joined", "joint_system"]


def joined(vectors: Vectors, blocks: Sequence[Block], values: Mapping[Block, Tensors], fill: float = 0.0) -> Tensors:
    """Return the vectors of all blocks one after the other; those of an absent block have `fill` everywhere."""
    filled = (vectors.get(block) or (torch.full_like(x, fill) for x in values[block]) for block in blocks)
    return tuple(x.detach() for own in filled for x in own)


def joint_system(
    product: Callable[[Vectors], Vectors], load: Vectors, blocks: Sequence[Block], values: Mapping[Block, Tensors]
) -> tuple[MatVec, Tensors]:
    """Return the matrix of second derivatives by all blocks, as products with joined vectors, and the right-hand side.

    Args:
        product: the product with the matrix, by block; an absent block is zero.
        load: the right-hand side, likewise.
        blocks: the blocks, in the order of the joined vectors.
        values: the variables of each block.
    """

    def matvec(vector: Tensors) -> Tensors:
        return joined(product(cut(vector, blocks, values)), blocks, values)

    return matvec, joined(load, blocks, values)
