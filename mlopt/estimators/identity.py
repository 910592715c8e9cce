"""The named estimators that assume a scaled identity as the inverse Hessian, each with a kind of products."""

from __future__ import annotations

from functools import cached_property
from typing import final

import attrs

from .. import linear
from ..problem import LevelSize, Linearization, Point, PullbackCost
from ..validation import boolean, one_of
from .implicit import Implicit, require_compiled
from .products import PRODUCTS
from .stationarity import Stationarity
from .streamed import Streamed

__all__ = ["FiniteDifference", "Identity"]


@attrs.frozen(kw_only=True)
class _ScaledIdentity(Implicit):
    """The estimators that assume the inverse Hessian c I."""

    scale: float = 1.0

    def __attrs_post_init__(self) -> None:
        _ = self.solver  # it checks its arguments

    @cached_property
    def solver(self) -> linear.Identity:
        return linear.Identity(scale=self.scale)


@final
@attrs.frozen(kw_only=True)
class Identity(_ScaledIdentity):
    """Assume that the inverse Hessian is c I: u_bar = -c (d2f / du dx) v.

    T1-T2 and DARTS set c to the learning rate of the level: then u_bar is the derivative through one plain SGD step from the
    present variables, without momentum and clip, for the cotangent v at these variables.

    Args:
        scale: c; 0 leaves the response of the level out, as DARTS of first order does.
        products: "autograd", "forward" or "finite_difference".
        compile: as in `LinearSolve`.
        streamed: for a level whose loss is a `Mixture`: inside `solve`, form the gradient of its weights from the gradients that
            its training step computes, with the cotangent of the previous outer step. It costs no network pass.

    Source: Luketina et al. 2016 (arXiv 1511.06727); Liu et al. 2019 (arXiv 1806.09055).

    Example:
        >>> from mlopt.testing import quadratic
        >>> problem = quadratic("two", mlopt.Identity()).problem
        >>> print(mlopt.hypergradient(problem).reports["y"].products)
        0
    """

    products: str = attrs.field(default="autograd", validator=one_of(*PRODUCTS))
    compile: bool = attrs.field(default=False, validator=[boolean, require_compiled])
    streamed: bool = attrs.field(default=False, validator=boolean)

    @property
    def needs_loss(self) -> str:
        return "streamed=True is for a loss that is a Mixture" if self.streamed else super().needs_loss

    def linearize(self, point: Point, level: str) -> Linearization:
        conditions = super().linearize(point, level)
        if isinstance(conditions, Stationarity) and self.streamed and point.carryover is not None:
            return Streamed(conditions, self.scale)
        return conditions

    def cost(self, size: LevelSize) -> PullbackCost | None:
        cost = super().cost(size)
        if cost is None or not self.streamed:
            return cost
        # A run keeps the cotangent, and the training step evaluates the losses; the first pullback is an ordinary one.
        return attrs.evolve(cost, kept=size.variables, evaluations=0)

    def __str__(self) -> str:
        return Implicit.__str__(self) + ", streamed" * self.streamed


@final
@attrs.frozen(kw_only=True)
class FiniteDifference(_ScaledIdentity):
    """Assume that the inverse Hessian is c I, with the mixed product by central differences: two gradients of u.

    u_bar = -c (f_u(x + e v, u) - f_u(x - e v, u)) / 2e, with e from the norms of x and v and the dtype. It takes first
    derivatives only, so it works with fused attention and activation checkpointing. For another solver with such products, pass
    `products="finite_difference"` to that solver's estimator.

    Args:
        scale: c; DARTS sets it to the learning rate of the level.

    Source: Liu et al. 2019 (arXiv 1806.09055), equation 8.

    Example:
        >>> from mlopt.testing import quadratic
        >>> problem = quadratic("two", mlopt.FiniteDifference()).problem
        >>> mlopt.hypergradient(problem).reports["y"].step > 0
        True
    """

    products = "finite_difference"
