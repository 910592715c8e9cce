"""The history of a sequence of linear systems that change slowly: a start and a preconditioner for the next, at no product."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import attrs
import torch
from torch import Tensor

from ..tensors import Tensors, add, flatten, norm, subtract
from ..validation import at_least

__all__ = ["History", "Pair"]

#: A direction d, and A d.
Pair: TypeAlias = tuple[Tensors, Tensors]

#: The least part of <d, A d> that newer pairs leave of a pair. Below it, the pair shows the change of A and rounding.
_INDEPENDENT = 0.1


@attrs.frozen(kw_only=True, eq=False)
class History:
    """The solution q of the latest of several systems A q = b, and pairs (d, A d) that their solves met.

    With the pairs as rows of D and Y, which are combined such that the symmetric part of D Y^T is the identity,

        P = D^T D + c (I - D^T Y) (I - Y^T D),    c = 1 / ||y||^2 of the newest pair,

    is symmetric and positive definite, and it equals A^-1 on the span of Y if all pairs are of one A. The next system A' q' = b'
    starts at q + P (b' - A q) + e. The drift e is the difference between the latest solution and q + P (b' - A q), which
    the change of A causes. Neither takes a product.

    A solver returns vectors in the form that it works on: one flat tensor, or one for each variable.

    Args:
        limit: the most pairs to keep, two vectors each.
        solution: q; empty before the first system.
        image: A q, as the solver computed it.
        drift: e; empty if it is not known.
        directions: D, for each tensor of a vector its rows (k, n), newest first; in single precision or better.
        images: Y, likewise.
        free: masks of the variables that a bound does not hold; empty if all are free.

    Source: Schnabel 1983, "Quasi-Newton methods using multiple secant equations", for the block update.

    Example:
        >>> solver, diagonal = mlopt.linear.ConjugateGradient(), torch.tensor([1.0, 2.0])
        >>> history = mlopt.linear.History(limit=2)
        >>> for right in ((1.0, 1.0), (3.0, 1.0)):
        ...     solution = solver.solve(lambda v: (diagonal * v[0],), (torch.tensor(right),), initial=history)
        ...     history = solution.history
        ...     print(solution.value, solution.products)
        (tensor([1.0000, 0.5000]),) 2
        (tensor([3.0000, 0.5000]),) 1
    """

    limit: int = attrs.field(default=20, validator=at_least(1))
    solution: Tensors = ()
    image: Tensors = ()
    drift: Tensors = ()
    directions: Tensors = ()
    images: Tensors = ()
    free: Tensors = ()

    def after(
        self, start: Tensors | None, solution: Tensors, image: Tensors, residual: Tensors, pairs: Sequence[Pair]
    ) -> History:
        """Return the history after the solve of one more system A q = b.

        Args:
            start: the start that the solve took from this history; None if it began at zero.
            solution: q.
            image: A q.
            residual: b - A q.
            pairs: directions with their products, oldest first.
        """
        directions, images = self.directions, self.images
        if pairs:
            newest, products = zip(*reversed(pairs), strict=True)
            directions, images = _conjugated(_stacked(newest, directions), _stacked(products, images), self.limit)
        history = History(limit=self.limit, solution=solution, image=image, directions=directions, images=images)
        if start is None:
            return history
        # The start is the prediction, and the drift before.
        drift = subtract(history._corrected(solution, residual), start)
        return attrs.evolve(history, drift=add(self.drift, drift) if self.drift else drift)

    def start(self, rhs: Tensors) -> Tensors | None:
        """Return the start for the next right-hand side; None before the first system."""
        if not self.solution:
            return None
        predicted = self._corrected(self.solution, subtract(rhs, self.image))
        return self._on_free(add(predicted, self.drift) if self.drift else predicted)

    def precondition(self, vector: Tensors) -> Tensors:
        """Return P v; v if there are no pairs."""
        if not self.directions:
            return vector
        parts = tuple(_wide(x) for x in vector)
        along = _onto(self.directions, parts)
        rest = _from(self.images, -along, parts)
        newest = norm([rows[0] for rows in self.images])
        rest = tuple(x / newest.to(x).square() for x in rest)
        full = _from(self.directions, along - _onto(self.images, rest), rest)
        return self._on_free(tuple(x.to(v).view_as(v) for x, v in zip(full, vector, strict=True)))

    def restricted(self, free: Tensors) -> History:
        """Return the history of the same systems on the free variables, for masks by variable."""
        return attrs.evolve(self, free=(flatten(free),) if len(self.solution) == 1 else free)

    def _corrected(self, solution: Tensors, residual: Tensors) -> Tensors:
        """Return q + P r; q if there are no pairs."""
        return add(solution, self.precondition(residual)) if self.directions else solution

    def _on_free(self, vector: Tensors) -> Tensors:
        return tuple(torch._foreach_mul(list(vector), list(self.free))) if self.free else vector


def _wide(vector: Tensor) -> Tensor:
    """Return a vector flat, in single precision or better."""
    return vector.reshape(-1).to(torch.promote_types(vector.dtype, torch.float32))


def _stacked(vectors: Sequence[Tensors], below: Tensors) -> Tensors:
    """Return, for each tensor of a vector, vectors as rows above others."""
    above = [torch.stack([_wide(x) for x in column]) for column in zip(*vectors, strict=True)]
    return tuple(torch.cat(pair) for pair in zip(above, below, strict=True)) if below else tuple(above)


def _onto(rows: Tensors, vector: Tensors) -> Tensor:
    """Return the inner products of rows with a vector, (k,), on the device of its first tensor."""
    products = [matrix @ x for matrix, x in zip(rows, vector, strict=True)]
    return products[0] if len(products) == 1 else torch.stack([x.to(products[0]) for x in products]).sum(0)


def _from(rows: Tensors, weights: Tensor, vector: Tensors) -> Tensors:
    """Return a vector plus the rows times their weights (k,)."""
    return tuple(torch.addmv(x, matrix.T, weights.to(x)) for matrix, x in zip(rows, vector, strict=True))


def _conjugated(directions: Tensors, images: Tensors, limit: int) -> tuple[Tensors, Tensors]:
    """Return at most `limit` combinations of pairs with D Y^T = I in its symmetric part, of each row with those above it.

    A pair is dropped if its curvature is not positive or not finite, or if the rows above it leave too little of it.
    """
    products = [(d @ y.T).cpu().double() for d, y in zip(directions, images, strict=True)]
    gram = torch.stack(products).sum(0)
    rest = (gram + gram.T) / 2
    sizes: list[float] = rest.diagonal().tolist()
    kept: list[int] = []
    columns = []
    for k, size in enumerate(sizes):
        left = float(rest[k, k])
        if len(kept) < limit and left > _INDEPENDENT * size:
            kept.append(k)
            columns.append(rest[:, k] / math.sqrt(left))
            rest.addr_(columns[-1], columns[-1], alpha=-1)
    if not kept:
        return (), ()
    factor = torch.stack(columns, dim=1)[kept]
    inverse = torch.linalg.inv(factor.tril())
    return tuple(inverse.to(d) @ d[kept] for d in directions), tuple(inverse.to(y) @ y[kept] for y in images)
