"""Products with the second derivatives of an objective whose loss is a mean over batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from ...problem import Block, Level, Objective, Term, Vectors, add_into, to_device
from ...tensors import Tensors, scale
from .product import Product
from .second_derivatives import SecondDerivatives

__all__ = ["MeanSecondDerivatives", "on_batches"]

#: Makes the term of a level on the batches of some levels.
TermOn: TypeAlias = Callable[[Mapping[str, Any]], Term]


def on_batches(
    level: Level, batches: Sequence[Any], term: TermOn, others: Sequence[Term], kind: Callable[[Term], Product]
) -> SecondDerivatives | MeanSecondDerivatives:
    """Return products with the second derivatives of a term on a level's curvature batches, plus those of other terms.

    The graph of a single batch is kept from one product to the next.
    """
    if len(batches) > 1:
        return MeanSecondDerivatives(level, batches, term, others, kind)
    batch = to_device(batches[0], level.device)
    return SecondDerivatives(Objective((term({level.name: batch}), *others)), kind)


class MeanSecondDerivatives:
    """Products with the second derivatives of (1/B) sum_b term_b + other terms, in the memory of one batch.

    A product passes over the batches in turn. It moves one to the device, evaluates the term there, and drops the graph before
    the next. Nothing of a batch is kept from one product to the next, so `autograd` traces each batch again. Every evaluation
    starts from the level's random numbers.

    Args:
        level: the level.
        batches: the batches, which count equally.
        term: makes the term on one batch.
        others: terms that use no batch: a regularizer, the decay.
        kind: makes the product of a term.
    """

    #: The last finite-difference step, in units of the direction; None if none was taken.
    step: float | Tensor | None = None

    def __init__(
        self,
        level: Level,
        batches: Sequence[Any],
        term: TermOn,
        others: Sequence[Term],
        kind: Callable[[Term], Product],
    ) -> None:
        self._level, self._batches, self._term, self._kind = level, batches, term, kind
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
        """Return the product of the term on one batch; its graph ends with the call."""
        term = self._term({self._level.name: to_device(batch, self._level.device)})
        products = SecondDerivatives(Objective([term]), self._kind)
        result = products(direction, wanted)
        self.step = products.step
        self._remarks += [remark for remark in products.remarks if remark not in self._remarks]
        return result
