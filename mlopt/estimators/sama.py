"""SAMA: the derivative of the optimiser's step, a diagonal matrix, stands in for the inverse Hessian."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, final

import attrs
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from .. import linear
from ..errors import EstimatorError
from ..problem import Level, LevelSize, Objective, Point, PullbackCost
from ..tensors import Tensors, norm
from ..validation import one_of
from .clipping import ClippedInverse, clipped
from .cost import implicit_cost
from .implicit import Implicit
from .products import PRODUCTS

__all__ = ["SAMA", "step_derivative"]


@final
@attrs.frozen(kw_only=True)
class SAMA(Implicit):
    """Assume that the inverse Hessian is the derivative of the level's optimiser step: u_bar = -(d2f / du dx) D v.

    D is the diagonal of d step / d gradient at the optimiser's latest step, with Adam's correction of its moments' bias. For
    SGD it is the learning rate. Outside `solve` D is that of a new optimiser's first step, which is tiny for Adam: that step is
    lr sign(g), for a g of any size. If the level has a `clip`, D is multiplied by the derivative of clipping. A variable that
    Adam has not stepped in the run, because its loss scale overflowed, has a derivative of zero.

    Args:
        products: "autograd", "forward" or "finite_difference".

    Raises:
        EstimatorError: in a pullback, if the level's optimiser is not SGD, Adam or AdamW, or a level lies inside the level.

    Source: Choe et al. 2023 (arXiv 2310.05674), section 3.2.

    Example:
        >>> print(mlopt.SAMA(products="autograd"))
        Identity() with autograd products, adapted
    """

    needs_optimizer: ClassVar[bool] = True

    products: str = attrs.field(default="finite_difference", validator=one_of(*PRODUCTS))

    @property
    def solver(self) -> None:
        return None

    def solver_at(self, point: Point, level: str) -> linear.AssumedInverse:
        own, live = point.problem[level], point.optimizer(level)
        size: Tensor | None
        if live is None:
            gradient = Objective.of(own, point).derivatives([level])[level]
            size = norm(gradient)
            gradient = clipped(gradient, own.clip)
        else:
            # The latest step leaves its clipped gradient behind; a variable that it did not move has none.
            gradient = tuple(torch.zeros_like(v) if v.grad is None else v.grad for v in own.parameters)
            size = point.gradient_norm(level)
        diagonal = linear.Diagonal(inverse=step_derivative(own, live, gradient, point.groups(level)))
        if own.clip is None or size is None:
            return diagonal
        return ClippedInverse(inverse=diagonal, gradient=gradient, size=size, limit=own.clip)

    def cost(self, size: LevelSize) -> PullbackCost | None:
        # The diagonal, and the image of the cotangent.
        return implicit_cost(linear.SolveCost(2, 0), size, self.product)

    def __str__(self) -> str:
        return f"{linear.Identity()} with {self.products} products, adapted"


def step_derivative(
    level: Level,
    live: Optimizer | None,
    gradient: Sequence[Tensor],
    settings: Sequence[dict[str, Any]] | None = None,
) -> Tensors:
    """Return -dx/dg, by component, for the latest step x <- x - step(g) of the level's optimiser.

    For SGD it is the learning rate. For Adam, with m^ and v^ the moments at step t after the correction of their bias, it is

        lr ((1 - b1) / (1 - b1^t) / (sqrt(v^) + eps) - m^ (1 - b2) g / ((1 - b2^t) sqrt(v^) (sqrt(v^) + eps)^2)).

    Args:
        level: the level.
        live: its optimiser after that step; None for the first step of a new optimiser.
        gradient: g of that step, for each of the level's variables.
        settings: the settings of the optimiser's groups in that step, if a scheduler has changed them since.

    Raises:
        EstimatorError: the derivative of this kind of optimiser is not known here.
    """
    optimizer = live if live is not None else _fresh(level)
    pairs = zip(optimizer.param_groups, settings or optimizer.param_groups, strict=True)
    groups = {id(p): own for group, own in pairs for p in group["params"]}
    state = optimizer.state if live is not None else {}
    return tuple(
        _diagonal(
            level, optimizer, groups[id(variable)], state.get(variable, {}), variable, g, live=live is not None
        ).to(variable)
        for variable, g in zip(level.parameters, gradient, strict=True)
    )


def _fresh(level: Level) -> Optimizer:
    if level.optimizer is None:
        raise EstimatorError(
            f"level {level.name!r}: SAMA uses the derivative of the optimiser's step, and optimizer=None; give the level an "
            "optimiser, such as partial(torch.optim.Adam, lr=1e-3)"
        )
    return level.optimizer if isinstance(level.optimizer, Optimizer) else level.optimizer(iter(level.parameters))  # type: ignore[arg-type]


@torch.no_grad()
def _diagonal(
    level: Level,
    optimizer: Optimizer,
    group: dict[str, Any],
    state: dict[str, Any],
    variable: Tensor,
    g: Tensor,
    *,
    live: bool,
) -> Tensor:
    kind = type(optimizer)
    if kind not in (SGD, Adam, AdamW) or any(group.get(key) for key in ("amsgrad", "dampening", "maximize")):
        raise EstimatorError(
            f"level {level.name!r}: SAMA cannot differentiate a step of {kind.__name__} with these settings, only of SGD, Adam "
            "and AdamW without amsgrad, dampening or maximize; use one of those, or Identity()"
        )
    if kind is SGD:
        return torch.full_like(g, group["lr"] * (1.0 + group["momentum"] if group["nesterov"] else 1.0))
    if kind is Adam and group["weight_decay"] and not group.get("decoupled_weight_decay"):
        # The decay at the start of the step, to first order in the learning rate.
        g = g + group["weight_decay"] * variable
    first, second = group["betas"]
    if live and not state:
        return torch.zeros_like(g)
    step = float(state["step"]) if state else 1.0
    mean = state["exp_avg"] if state else (1 - first) * g
    square = state["exp_avg_sq"] if state else (1 - second) * g.square()
    mean, square = mean / (1 - first**step), square / (1 - second**step)
    root = square.sqrt()
    scale = root + group["eps"]
    # If a component never had a gradient, root and mean are zero; this part of the derivative is then taken to be zero.
    bend = mean * g * (1 - second) / (1 - second**step) / root.clamp_min(torch.finfo(root.dtype).tiny) / scale.square()
    diagonal: Tensor = group["lr"] * ((1 - first) / (1 - first**step) / scale - bend)
    return diagonal
