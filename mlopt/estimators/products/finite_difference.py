"""Central differences of first derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ...problem import Block, Term, Vectors, add_into
from ...tensors import Tensors
from .difference import Difference
from .lengths import Moves, moves_of
from .product import Product

__all__ = ["FiniteDifferenceProduct"]


class FiniteDifferenceProduct(Product):
    """Central differences of first derivatives, for every kernel, activation checkpointing and sharded parameters.

    The step moves the variables by a fraction of their norm that suits their dtype. Small variables, and tensors of very
    different sizes, take a few differences more at first use, at which steps are compared.
    """

    evaluations: ClassVar[int] = 2

    def __init__(self, term: Term) -> None:
        super().__init__(term)
        #: By block that was moved, the mean of its first derivative on both sides, which is that in the middle.
        self._gradients: dict[Block, Tensors] = {}
        self._moves: dict[tuple[tuple[Block, ...], tuple[Block, ...]], Moves] = {}

    def needs_verification(self, direction: Vectors, wanted: Sequence[Block]) -> bool:
        return True

    def __call__(self, direction: Vectors, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        blocks = (tuple(direction), tuple(wanted))
        moves = self._moves.get(blocks) or moves_of(self.term, direction, wanted)
        if moves is None:  # along a direction of zero, every step is right
            moves = Moves()
        else:
            self._moves[blocks] = moves
        if moves.remark:
            self.remark(moves.remark)
        total: dict[Block, Tensors] = {}
        for chosen, least in moves.groups:
            difference = Difference(self.term, direction, wanted, chosen)
            self.step = difference.step(moves.factor * difference.reach().clamp_min(least))
            fresh = [block for block in wanted if block in direction and block not in self._gradients]
            add_into(total, difference(self.step, kept=fresh))
            self._gradients |= difference.kept
        return total

    def known_gradient(self, block: Block) -> Tensors | None:
        return self._gradients.get(block)
