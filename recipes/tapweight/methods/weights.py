"""The weights of the objectives: positive numbers that sum to one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import Adam

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

__all__ = ["DelayedAdam", "SimplexWeights", "relative_signals"]


class SimplexWeights(nn.Module):
    """lambda = softmax(a): called without arguments it returns the weights (K,); a starts at zero, equal weights.

    The derivative by a is lambda_k (d_k - sum_j lambda_j d_j) for d = dL/dlambda: only the difference of an objective from the
    weighted mean of all moves it. It carries no scale of its own, so with an optimiser that normalises its steps (Adam) one
    learning rate serves every task.

    Args:
        count: K, the number of objectives.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(count))

    def forward(self) -> Tensor:
        return self.logits.softmax(0)


class DelayedAdam(Adam):
    """Adam whose first steps leave the variables, and its own moments, as they are.

    While the heads of the objectives and of the task are near their random start, their gradients align by chance. Weights that
    follow this chance reinforce it: an objective that loses weight stops training its head.

    Args:
        parameters: the variables.
        lr: learning rate.
        delay: the number of steps to leave out.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, lr: float, delay: int) -> None:
        super().__init__(parameters, lr=lr)
        for group in self.param_groups:
            group["delay"] = delay

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step, or reduce the delay by one."""
        if self.param_groups[0]["delay"] > 0:
            for group in self.param_groups:
                group["delay"] -= 1
        else:
            super().step(closure)


def relative_signals(gradient: Tensor, weights: Tensor) -> Tensor:
    """Return s_k - sum_j lambda_j s_j from the gradient by a, where s_k = -dL/dlambda_k.

    A positive value means that more of objective k lowers the validation loss, compared with the present mixture.

    Args:
        gradient: dL/da, (K,).
        weights: lambda, (K,).
    """
    return -gradient / weights
