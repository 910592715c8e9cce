"""A small encoder, objectives and a task, in float64, for tests of TapWeight that need no molecules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanSquaredError

from mlopt.recipes import TapWeight
from mlopt.recipes.tapweight import encoder
from mlopt.recipes.tapweight.objective import Objective
from mlopt.recipes.tapweight.settings import Settings
from mlopt.recipes.tapweight.task import Task

F64 = torch.float64
SETTINGS = Settings(batch_size=8, task_batch_size=8, valid_batch_size=8, epochs=2, measurements=4)


class Encoder(encoder.Encoder):
    width = 4

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4, dtype=F64)

    def forward(self, batch: Tensor) -> Tensor:
        return self.layer(batch).tanh()


class Reconstruct(Objective):
    """Predict a power of the absolute input; the power 0 is useless."""

    def __init__(self, name: str, power: float) -> None:
        self.name, self.power = name, power

    def head(self, encoder: nn.Module) -> nn.Module:
        return nn.Linear(encoder.width, 3, dtype=F64)

    def view(self, batch: Tensor) -> Tensor:
        return batch * torch.bernoulli(torch.full_like(batch, 0.7))

    def loss(self, encoder: nn.Module, head: nn.Module, view: Tensor) -> Tensor:
        return (head(encoder(view)) - view.abs().pow(self.power)).square().mean()


class Sum(Task):
    metric_name, greater_is_better = "mse", False

    def collate(self, examples):
        return torch.stack(examples)

    def head(self, encoder):
        return nn.Linear(encoder.width, 1, dtype=F64)

    def outputs(self, encoder, head, batch):
        return head(encoder(batch)).squeeze(1)

    def losses(self, outputs, batch):
        return (outputs - batch.sum(1)).square()

    def columns(self, batch):
        return batch.sum(1, keepdim=True)

    def metric(self):
        return MeanSquaredError()

    def targets(self, batch):
        return batch.sum(1)


def recipe(
    encoder: Callable[[], encoder.Encoder] = Encoder,
    objectives: Sequence[Objective] = (Reconstruct("linear", 1.0), Reconstruct("square", 2.0)),
    corpus: Sequence[Tensor] | None = None,
    **arguments: Any,
) -> TapWeight:
    torch.manual_seed(1)
    task = Sum({split: list(torch.randn(24, 3, dtype=F64)) for split in ("train", "valid", "test")})
    corpus = list(torch.randn(40, 3, dtype=F64)) if corpus is None else corpus
    return TapWeight(encoder(), objectives, task, corpus, **{"settings": SETTINGS, **arguments})


def weights_gradient(
    weights: Tensor, losses: Iterable[Tensor], parameters: Sequence[Tensor], v: Sequence[Tensor], gamma: float
) -> Tensor:
    """Return dL/da = -2 gamma (diag(lambda) - lambda lambda^T) s with s_k = <grad_theta L_k, v>, from plain torch.

    The gradient of each loss is taken before the next loss is evaluated.
    """
    signals = []
    for loss in losses:
        gradient = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        signals.append(sum((g * x).sum() for g, x in zip(gradient, v, strict=True)))
    return -2 * gamma * (torch.diag(weights) - weights[:, None] * weights) @ torch.stack(signals)
