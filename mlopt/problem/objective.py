"""The objective of a level: a sum of terms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ranks import Ranks
from ..shards import local
from ..tensors import Tensors, add, scale, subtract
from .estimator import Block, Vectors
from .fixed_point import FixedPoint
from .residual import ResidualTerm
from .term import LevelTerm, Term

if TYPE_CHECKING:
    from .level import Level
    from .point import Point

__all__ = ["Objective", "add_into", "compare_evaluations", "own_gradient", "sum_values", "used_derivatives"]


class Objective:
    """A sum of terms, with its value and first derivatives. Products with its second derivatives are in `estimators.products`.

    Args:
        terms: one or more, in the order of summation.
    """

    def __init__(self, terms: Iterable[Term]) -> None:
        self.terms = tuple(terms)

    @classmethod
    def of(cls, level: Level, point: Point, batches: Mapping[str, Any] | None = None) -> Objective:
        """Return a level's objective at a point: its loss, on the point's batch or another, and its regularizer, if any."""
        return cls(cls.parts(level, point, batches))

    @staticmethod
    def parts(
        level: Level, point: Point, batches: Mapping[str, Any] | None = None, sign: float = 1.0
    ) -> tuple[LevelTerm, ...]:
        """Return the terms of a level's objective, times a sign; for a level with a residual, the term of that."""
        if level.residual is not None:
            return (ResidualTerm(point, level, batches, sign),)
        loss = LevelTerm(point, level, "loss", batches, sign)
        return (loss,) if level.regularizer is None else (loss, LevelTerm(point, level, "regularizer", sign=sign))

    @classmethod
    def minimized(
        cls, level: Level, point: Point, batches: Mapping[str, Any] | None = None, fixed: FixedPoint | None = None
    ) -> Objective:
        """Return what the steps of a level minimise: its objective, negated by `maximize`, and the decay of its optimiser.

        Args:
            level: the level.
            point: the point.
            batches: the batch of each level; the point's if None.
            fixed: the condition at which the steps end; read from the level's optimiser if None.
        """
        fixed = FixedPoint.of(level, point) if fixed is None else fixed
        return cls((*cls.parts(level, point, batches, fixed.sign), *fixed.terms(level.name, point)))

    def value(self) -> Tensor:
        """Return the objective at the live variables, a scalar with a graph; on several processes, that of this one's piece."""
        ranks, pieces = self._ranks, list[Tensor]()

        def evaluate() -> list[Tensor]:
            pieces.append(sum_values(term.value() for term in self.terms))
            return pieces

        if not ranks.several:
            return evaluate()[0]
        (total,) = ranks.together(evaluate, [local(next(iter(self.terms[0].values.values()))[:1])[0].new_zeros(())])
        # Exactly the total, so that every process has the same number; the graph is that of the piece.
        return total + (pieces[0] - pieces[0].detach())

    def number(self) -> float:
        """Return the objective at the live variables, summed in double precision; one graph is held at a time."""

        def evaluate() -> float:
            return sum(float(term.value().detach()) for term in self.terms)

        if not self._ranks.several:
            return evaluate()
        like = torch.zeros((), dtype=torch.float64, device=next(iter(self.terms[0].values.values()))[0].device)
        return float(self._ranks.together(lambda: [torch.full_like(like, evaluate())], [like])[0])

    @property
    def _ranks(self) -> Ranks:
        return self.terms[0].point.problem.ranks

    def derivatives(self, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        """Return the first derivatives at the live variables, without a graph; absent blocks are zero."""
        total: dict[Block, Tensors] = {}
        for term in self.terms:
            if own := [block for block in wanted if block in term.blocks]:
                add_into(total, term.derivatives(own))
        return total


def used_derivatives(value: Tensor, variables: Sequence[Tensor], ranks: Ranks) -> tuple[Tensor | None, ...]:
    """Return the first derivatives of an objective, with None for variables that it does not use in any process.

    Args:
        value: the value of an objective, with its graph.
        variables: live variables.
        ranks: the processes that share it.
    """

    def evaluate() -> tuple[Tensor | None, ...]:
        if not value.requires_grad:
            return (None,) * len(variables)
        return torch.autograd.grad(value, variables, allow_unused=True)

    def pieces() -> list[Tensor]:
        own = evaluate()
        used = torch.tensor([g is not None for g in own]).to(variables[0])
        return [*(torch.zeros_like(v) if g is None else g for g, v in zip(own, variables, strict=True)), used]

    if not ranks.several:
        return evaluate()
    *total, used = ranks.together(pieces, [*variables, variables[0].new_zeros(len(variables))])
    return tuple(g if count else None for g, count in zip(total, used.tolist(), strict=True))


def own_gradient(level: Level, point: Point) -> Tensors:
    """Return what a level without levels inside steps along, before sign and decay: the gradient of its loss, or its residual."""
    objective = Objective.of(level, point)
    (first, *_) = objective.terms
    block = first.multiplier if isinstance(first, ResidualTerm) else level.name
    return objective.derivatives([block])[block]


def sum_values(values: Iterable[Tensor]) -> Tensor:
    """Return the sum of the values of an objective's terms, in their order."""
    first, *rest = values
    return sum(rest, first)


def add_into(total: dict[Block, Tensors], vectors: Vectors, *, sign: float = 1.0) -> None:
    """Add vectors to a sum over blocks, in place; a block that is absent is zero."""
    for block, vector in vectors.items():
        if block not in total:
            total[block] = vector if sign == 1.0 else scale(sign, vector)
        else:
            total[block] = add(total[block], vector) if sign == 1.0 else subtract(total[block], vector)


def compare_evaluations(term: LevelTerm) -> None:
    """Evaluate a term twice at the same variables, batch and random numbers; keep a remark if the values differ."""
    first, second = (term.value().detach() for _ in range(2))
    precision = torch.finfo(first.dtype).eps
    # Sums on a GPU may differ by rounding.
    if not torch.allclose(first, second, rtol=precision**0.5, atol=10 * precision, equal_nan=True):
        term.workspace.doubts["loss", term.name, term.name, term.part] = (
            f"the {term.part} of level {term.name!r} is {first:.6g} and then {second:.6g} at the same variables, batch and "
            "random numbers, so that its derivatives are of different functions; let it count no calls, and draw from the "
            "global generators of torch, numpy or Python"
        )
