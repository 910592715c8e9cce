"""A minimiser that converges to the last digit: L-BFGS that trusts gradients, not values, near the solution."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

import attrs
import torch
from torch import Tensor

__all__ = ["Minimum", "minimize"]

#: Takes variables (n,) and returns the objective and its gradient (n,).
Objective: TypeAlias = Callable[[Tensor], tuple[float, Tensor]]

_MEMORY = 20
_HALVINGS = 30
#: Steps without a lower value or a smaller gradient after which the error is taken to be rounding.
_PATIENCE = 40


@attrs.frozen(eq=False)
class Minimum:
    """The end of a minimisation: the variables (n,) of smallest gradient, the norm of that gradient, and steps taken."""

    variables: Tensor
    gradient_norm: float
    steps: int


def minimize(objective: Objective, start: Tensor, *, tolerance: float, steps: int = 1_000) -> Minimum:
    """Minimise an objective by L-BFGS with backtracking, from `start`, until its gradient is small or steps stop helping.

    A step is accepted if the objective falls or, once values no longer distinguish two points, if the slope along
    the step shrinks: so the iteration ends at the precision of gradients, not at the square root of that of values.

    Args:
        objective: returns value and gradient.
        start: variables, (n,).
        tolerance: norm of the gradient to stop at.
        steps: maximum number of steps.

    Source: Liu & Nocedal 1989; the tolerant line search after Hager & Zhang 2005.

    Example:
        >>> from mlopt.diagnosis.minimize import minimize
        >>> minimize(lambda x: (float(x @ x), 2 * x), torch.ones(3), tolerance=1e-6).gradient_norm < 1e-6
        True
    """
    point = start
    value, gradient = objective(point)
    best, smallest, waited, k = point, float(gradient.norm()), 0, 0
    pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=_MEMORY)
    noise = 10 * torch.finfo(start.dtype).eps
    slack = math.sqrt(noise)
    while smallest > tolerance and k < steps and waited < _PATIENCE:
        direction = _direction(gradient, pairs)
        slope = float(gradient @ direction)
        if slope >= 0.0:
            pairs.clear()
            direction, slope = -gradient, -float(gradient @ gradient)
        length = 1.0 if pairs else 1.0 / max(1.0, float(gradient.norm()))
        for _ in range(_HALVINGS):
            trial = point + length * direction
            trial_value, trial_gradient = objective(trial)
            if trial_value <= value + 1e-4 * length * slope:
                break
            if (
                trial_value <= value + slack * (1.0 + abs(value))
                and abs(float(trial_gradient @ direction)) <= -0.9 * slope
            ):
                break
            length /= 2
        else:
            # Even the smallest step does not help: discard the curvature, or end.
            waited = waited + 1 if pairs else _PATIENCE
            pairs.clear()
            continue
        step, change = trial - point, trial_gradient - gradient
        if float(step @ change) > 0.0:
            pairs.append((step, change))
        size, fallen = float(trial_gradient.norm()), value - trial_value > noise * (1.0 + abs(value))
        waited = 0 if size < smallest or fallen else waited + 1
        point, value, gradient, k = trial, trial_value, trial_gradient, k + 1
        if size < smallest:
            best, smallest = point, size
    return Minimum(best, smallest if math.isfinite(smallest) else math.inf, k)


def _direction(gradient: Tensor, pairs: deque[tuple[Tensor, Tensor]]) -> Tensor:
    """Return -B g, with the inverse Hessian B estimated from the pairs (step, change of the gradient)."""
    direction, applied = -gradient, []
    for step, change in reversed(pairs):
        weight = float(step @ direction) / float(step @ change)
        direction = direction - weight * change
        applied.append(weight)
    if pairs:
        step, change = pairs[-1]
        direction = direction * (float(step @ change) / float(change @ change))
    for (step, change), weight in zip(pairs, reversed(applied), strict=True):
        direction = direction + (weight - float(change @ direction) / float(step @ change)) * step
    return direction
