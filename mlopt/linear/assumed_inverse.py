"""Inverses that are assumed instead of solved for: the identity, or a given diagonal."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import attrs
import torch

from ..finiteness import require_finite
from ..tensors import Tensors, scale
from ..validation import at_least
from .history import History
from .solver import NOT_FINITE, LinearSolution, LinearSolver, MatVec, SolveCost

__all__ = ["AssumedInverse", "Diagonal", "Identity"]


class AssumedInverse(LinearSolver):
    """A rule that assumes A^-1 = P for a fixed P: x = P b, without any product with A.

    It measures nothing, so the host does not wait for the device.

    Example:
        >>> solver = mlopt.linear.Identity()
        >>> isinstance(solver, mlopt.linear.AssumedInverse)
        True
        >>> solver.solve(lambda v: v, (torch.ones(2),)).residual is None
        True
    """

    needs_symmetry: ClassVar[bool] = False
    takes_shards: ClassVar[bool] = True
    damping = 0.0

    @property
    def vanishes(self) -> bool:
        """True if P = 0."""
        return False

    @abstractmethod
    def image(self, vector: Tensors) -> Tensors:
        """Return P times a vector."""

    def cost(self, unknowns: int) -> SolveCost:
        return SolveCost(2, 0)

    def solve(self, matvec: MatVec, rhs: Tensors, *, initial: Tensors | History | None = None) -> LinearSolution:
        require_finite(rhs, lambda _: NOT_FINITE)
        return LinearSolution(value=self.image(rhs))

    def _solve(self, matvec: MatVec, rhs: Tensors, size: float, initial: Tensors | None) -> LinearSolution:
        return LinearSolution(value=self.image(rhs))


@attrs.frozen(kw_only=True)
class Identity(AssumedInverse):
    """Assume A^-1 = c I: x = c b.

    This is the T1-T2 or DARTS approximation (Luketina et al. 2016, arXiv 1511.06727; Liu et al. 2019, arXiv 1806.09055).

    Args:
        scale: c; 0 assumes that x = 0.

    Example:
        >>> mlopt.linear.Identity(scale=0.5).solve(lambda v: (3.0 * v[0],), (torch.ones(2),)).value
        (tensor([0.5000, 0.5000]),)
    """

    scale: float = attrs.field(default=1.0, validator=at_least(0.0))

    @property
    def vanishes(self) -> bool:
        return self.scale == 0.0

    def cost(self, unknowns: int) -> SolveCost:
        return SolveCost(int(self.scale != 1.0), 0)

    def __str__(self) -> str:
        return "Identity()" if self.scale == 1.0 else f"Identity(scale={self.scale!r})"

    def image(self, vector: Tensors) -> Tensors:
        return vector if self.scale == 1.0 else scale(self.scale, vector)


@attrs.frozen(kw_only=True, eq=False)
class Diagonal(AssumedInverse):
    """Assume A^-1 = diag(d): x_i = d_i b_i.

    Args:
        inverse: d, in the shapes of b.

    Example:
        >>> solver = mlopt.linear.Diagonal(inverse=(torch.tensor([0.5, 0.1]),))
        >>> solver.solve(lambda v: v, (torch.ones(2),)).value
        (tensor([0.5000, 0.1000]),)
    """

    inverse: Tensors = attrs.field(repr=False)

    def image(self, vector: Tensors) -> Tensors:
        return tuple(torch._foreach_mul(list(vector), list(self.inverse)))
