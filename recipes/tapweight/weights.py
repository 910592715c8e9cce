"""The weights of the objectives: positive numbers that sum to one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SimplexWeights", "relative_signals"]


class SimplexWeights(nn.Module):
    """lambda = softmax(a): called without arguments it returns the weights (K,); a starts at zero, equal weights.

    The derivative by a is lambda_k (d_k - sum_j lambda_j d_j) for d = dL/dlambda: only how an objective compares with the
    weighted mean of all moves it. It carries no scale of its own, so an optimiser that normalises its steps (Adam) makes one
    learning rate serve every task.

    Args:
        count: K, the number of objectives.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(count))

    def forward(self) -> Tensor:
        return self.logits.softmax(0)


def relative_signals(gradient: Tensor, weights: Tensor) -> Tensor:
    """Return s_k - sum_j lambda_j s_j from the gradient by a, where s_k = -dL/dlambda_k.

    A positive value says that more of objective k lowers the validation loss, compared with the present mixture.

    Args:
        gradient: dL/da, (K,).
        weights: lambda, (K,).
    """
    return -gradient / weights
