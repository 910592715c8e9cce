"""The term of a nested level's Lagrangian that belongs to a level inside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..problem import Block, Objective, Point, Term, Vectors, add_into, derivatives
from ..tensors import Tensors, dot, zeros_like
from .products import Product, SecondDerivatives

__all__ = ["MultiplierTerm"]


class MultiplierTerm(Term):
    """<M, grad L_c> over the states of a level c inside: the part of a nested level's Lagrangian that belongs to c.

    Args:
        point: the point.
        owner: the nested level, whose multipliers M are.
        name: c.
        objective: L_c.
        states: the blocks of c.
        kind: the kind of products.
    """

    def __init__(
        self, point: Point, owner: str, name: str, objective: Objective, states: Sequence[Block], kind: type[Product]
    ) -> None:
        self.point, self._objective, self._states, self._kind = point, objective, states, kind
        self._device = point.problem[name].device
        self.label = owner, f"response of {name!r}"
        self.order = 1 + max(term.order for term in objective.terms)
        self._owned = {(owner, block): block for block in states}
        self.values = point.values
        self.blocks = frozenset(self._owned).union(*(term.blocks for term in objective.terms))

    def roots(self) -> list[Tensor]:
        return [root for term in self._objective.terms for root in term.roots()]

    def value(self) -> Tensor:
        total = torch.zeros((), device=self._device)
        for term in self._objective.terms:
            blocks = [block for block in self._states if block in term.blocks]
            gradient = derivatives(term.value(), blocks, self.values, traced=True)
            for key, block in self._owned.items():
                if block in gradient:
                    total = total + dot(self.values[key], gradient[block])
        return total

    def function(self, values: Vectors) -> Tensor:
        values = {**self.values, **values}

        def lagrangian(states: dict[Block, Tensors]) -> Tensor:
            terms = [term.function({**values, **states}) for term in self._objective.terms]
            return torch.stack(terms).sum()

        gradient = torch.func.grad(lagrangian)({block: values[block] for block in self._states})
        return torch.stack([dot(values[key], gradient[block]) for key, block in self._owned.items()]).sum()

    def derivatives(self, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        """Return products with the second derivatives of c for its states and arguments, its first ones for the multipliers."""
        direction = {block: tuple(m.detach() for m in self.values[key]) for key, block in self._owned.items()}
        total = {block: zeros_like(self.values[block]) for block in wanted}
        add_into(total, SecondDerivatives(self._objective, self._kind)(direction, wanted))
        owned = {key: self._owned[key] for key in wanted if key in self._owned}
        gradient = self._objective.derivatives(list(owned.values()))
        add_into(total, {key: gradient[block] for key, block in owned.items()})
        return total
