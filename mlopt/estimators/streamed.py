"""The pullback through a mixture of losses, from the gradients that its own training step computes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..finiteness import require_finite
from ..problem import Block, LevelTerm, Linearization, Report, StreamedCotangent, Vectors, add_into
from ..tensors import Tensors, scale, zeros_like
from .stationarity import Stationarity

__all__ = ["Streamed"]


class Streamed(Linearization):
    """The pullback of the identity for a level whose loss is a `Mixture`, without a network pass of its own.

    For f = sum_k w_k(a) L_k(x), the mixed product with a is d/da <w(a), s> with s_k = <grad L_k, p>. The level's training step
    forms s with p = c v, the scaled cotangent of the previous outer step, which this rule holds for it. The first pullback of a
    run, and every pullback through a level whose loss is not a mixture, is the ordinary one.

    Args:
        conditions: the level's stationarity conditions, at a point of a run. A level around this one uses them alone.
        factor: c, the assumed inverse Hessian.
    """

    def __init__(self, conditions: Stationarity, factor: float) -> None:
        self._factor = factor
        self.conditions, self._point, self._name = conditions, conditions.point, conditions.name
        self.blocks, self.arguments = conditions.blocks, conditions.arguments
        self.report = conditions.report

    def pullback(self, cotangent: Vectors, wanted: Sequence[str] | None = None) -> dict[Block, Tensors]:
        wanted = self.arguments if wanted is None else wanted
        weights = self._point.workspace.mixtures.get(self._name)
        if weights is not None and weights in wanted:
            held = self._exchange(self.conditions.on_free(cotangent.get(self._name)))
            if held is not None and held.signals is not None:
                self.report.age = 1
                return self._pull_held(held.cotangent, weights, held.signals, wanted)
        return self.conditions.pullback(cotangent, wanted)

    def reports(self) -> dict[str, Report]:
        return self.conditions.reports()

    def _exchange(self, present: Tensors | None) -> StreamedCotangent | None:
        """Hold the present cotangent for the next training step, and return the one that was held for the latest.

        Raises:
            NonFiniteError: the present cotangent is not finite; it is not held, because every later step would fail by it.
        """
        assert self._point.carryover is not None
        name = self._name  # a check that is deferred must not keep the point
        if present is not None:
            require_finite(present, lambda _: f"the cotangent on level {name!r} is not finite")
        cotangents = self._point.carryover.cotangents
        held = cotangents.get(name)
        cotangents[name] = StreamedCotangent(
            zeros_like(self._point.values[name]) if present is None else scale(self._factor, present)
        )
        return held

    def _pull_held(
        self, cotangent: Tensors, weights: str, signals: Tensor, wanted: Sequence[str]
    ) -> dict[Block, Tensors]:
        mixture = self.conditions.objective.terms[0]
        assert isinstance(mixture, LevelTerm)
        pulled: dict[Block, Tensors] = {weights: mixture.streamed(weights, signals)}
        # The training step forms neither the other arguments of the mixture nor the regularizer.
        for product in self.conditions.second_derivatives.products:
            rest = [a for a in wanted if a in product.term.blocks and (product.term is not mixture or a != weights)]
            if rest:
                add_into(pulled, product({self._name: cotangent}, rest))
        return {block: scale(-1.0, vectors) for block, vectors in pulled.items()}
