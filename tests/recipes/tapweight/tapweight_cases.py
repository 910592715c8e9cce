"""A small encoder, objectives and a task, in float64, for tests of TapWeight that need no molecules."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics import MeanSquaredError

from mlopt.recipes.tapweight import encoder
from mlopt.recipes.tapweight.objective import Objective
from mlopt.recipes.tapweight.task import Task

F64 = torch.float64


class Encoder(encoder.Encoder):
    width = 4

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4, dtype=F64)

    def forward(self, batch: Tensor) -> Tensor:
        return self.layer(batch).tanh()


class Reconstruct(Objective):
    """Predict a function of the input, or nothing of use."""

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

    def metric(self):
        return MeanSquaredError()

    def targets(self, batch):
        return batch.sum(1)
