"""Products with the second derivatives of an objective whose loss is a mean over batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...problem import Block, FixedPoint, Level, LevelTerm, Objective, Point, Vectors, add_into, to_device
from ...tensors import Tensors, scale
from .product import Product
from .second_derivatives import SecondDerivatives

__all__ = ["MeanSecondDerivatives"]


class MeanSecondDerivatives:
    """Products with the second derivatives of (1/B) sum_b loss_b + regularizer + decay, in the memory of one batch.

    A product passes over the batches in turn. It moves one to the device, evaluates the loss there, and drops the graph before
    the next. Nothing of a batch is kept from one product to the next, so `autograd` traces each batch again. Every evaluation
    starts from the level's random numbers.

    Args:
        level: the level.
        point: the point.
        batches: the batches, which count equally.
        fixed: the condition at which the level's steps end.
        kind: makes the product of a term.
    """

    #: The last finite-difference step, in units of the direction; None if none was taken.
    step: float | Tensor | None = None

    def __init__(
        self, level: Level, point: Point, batches: Sequence[Any], fixed: FixedPoint, kind: type[Product]
    ) -> None:
        self._level, self._point, self._batches, self._fixed, self._kind = level, point, batches, fixed, kind
        _, *others = Objective.minimized(level, point, {level.name: batches[0]}, fixed).terms
        self._others = SecondDerivatives(Objective(others), kind)
        self._remarks: list[str] = []

    @property
    def remarks(self) -> list[str]:
        """Sentences about products that are in doubt."""
        return [*self._remarks, *self._others.remarks]

    def __call__(self, direction: Vectors, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        """Return the components d/dw <grad_D f, direction> for w in `wanted`; absent ones are zero."""
        total: dict[Block, Tensors] = {}
        for batch in self._batches:
            add_into(total, self._on(batch, direction, wanted))
        total = {block: scale(1.0 / len(self._batches), vectors) for block, vectors in total.items()}
        add_into(total, self._others(direction, wanted))
        return total

    def _on(self, batch: Any, direction: Vectors, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        """Return the product of the loss on one batch; its graph ends with the call."""
        level = self._level
        moved = {level.name: to_device(batch, level.device)}
        loss = LevelTerm(self._point, level, "loss", moved, self._fixed.sign)
        products = SecondDerivatives(Objective([loss]), self._kind)
        result = products(direction, wanted)
        self.step = products.step
        self._remarks += [remark for remark in products.remarks if remark not in self._remarks]
        return result
