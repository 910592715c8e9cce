"""A root finder that converges to the last digit: Newton's method, with steps that are halved until the residual falls."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from .minimize import Minimum

__all__ = ["find_root"]

#: Takes variables (n,) and returns the residual (n,), or the Newton step there.
Function: TypeAlias = Callable[[Tensor], Tensor]

_HALVINGS = 30


def find_root(residual: Function, newton: Function, start: Tensor, *, tolerance: float, steps: int = 100) -> Minimum:
    """Return where a residual F is zero, from `start`: x <- x - F_x^-1 F, until ||F|| is small or steps stop helping.

    Args:
        residual: returns F(x), (n,).
        newton: returns -F_x^-1 F at the x at which the residual was called last.
        start: variables, (n,).
        tolerance: ||F|| to stop at.
        steps: the most steps.

    Returns:
        The variables of smallest ||F||, that norm, and the number of steps.

    Source: Nocedal & Wright 2006, algorithm 11.4.

    Example:
        >>> import torch
        >>> from mlopt.diagnosis.root import find_root
        >>> root = find_root(lambda x: x**2 - 2, lambda x: -(x**2 - 2) / (2 * x), torch.ones(1), tolerance=1e-6)
        >>> root.variables
        tensor([1.4142])
    """
    point, size, k = start, float(residual(start).norm()), 0
    while size > tolerance and k < steps:
        step, length = newton(point), 1.0
        for _ in range(_HALVINGS):
            trial = point + length * step
            reached = float(residual(trial).norm())
            if reached < (1.0 - 1e-4 * length) * size:
                break
            length /= 2
        else:
            break
        point, size, k = trial, reached, k + 1
    return Minimum(point, size if math.isfinite(size) else math.inf, k)
