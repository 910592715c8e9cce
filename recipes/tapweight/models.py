"""The two models that are trained, and their losses: an encoder with a head for each objective, and one with the task's head."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mlopt.errors import ArgumentError
from mlopt.rng import preserved, seed_everything

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .encoder import Encoder
    from .objective import Objective
    from .task import Task

__all__ = ["Finetuning", "Merged", "Pretraining", "gradient_norms", "objective_losses", "task_losses"]


class Pretraining(nn.Module):
    """theta: the encoder, and one head for each objective.

    Args:
        encoder: the encoder; used itself, not a copy.
        objectives: in the order of their weights.
    """

    def __init__(self, encoder: Encoder, objectives: Sequence[Objective]) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict({objective.name: objective.head(encoder) for objective in objectives})


class Finetuning(nn.Module):
    """omega: a copy of the encoder, and the task's head.

    Args:
        encoder: copied.
        task: makes the head.
    """

    def __init__(self, encoder: Encoder, task: Task) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        self.head = task.head(encoder)


class Merged(nn.Module):
    """theta and the task's head on the same encoder; called with a batch it returns the task's loss of each example, (B,).

    Args:
        model: theta; used itself, not a copy.
        task: makes the head.
    """

    def __init__(self, model: Pretraining, task: Task) -> None:
        super().__init__()
        self.model = model
        self.head = task.head(model.encoder)
        self._task = task

    def forward(self, batch: Any) -> Tensor:
        return self._task.losses(self._task.outputs(self.model.encoder, self.head, batch), batch)


def objective_losses(
    model: Pretraining, batch: Any, objectives: Sequence[Objective], scales: Mapping[str, float]
) -> dict[str, Callable[[], Tensor]]:
    """Return functions by name that compute each objective's loss on its own view of the batch, over its scale."""

    def loss(objective: Objective) -> Tensor:
        value = objective.loss(model.encoder, model.heads[objective.name], objective.view(batch))
        return value / scales[objective.name]

    return {objective.name: partial(loss, objective) for objective in objectives}


def task_losses(model: Finetuning, batch: Any, task: Task) -> Tensor:
    """Return the task's loss of each example of a batch, (B,)."""
    return task.losses(task.outputs(model.encoder, model.head, batch), batch)


def gradient_norms(
    model: Pretraining, objectives: Sequence[Objective], batches: Sequence[Any], seed: int
) -> dict[str, float]:
    """Return the root mean square over batches of ||grad L_k|| on the encoder, for each objective.

    Raises:
        ValueError: an objective gives the encoder no gradient, or one that is not finite.
    """
    perturbed = copy.deepcopy(model)
    parameters = [p for p in perturbed.encoder.parameters() if p.requires_grad]
    norms = {}
    with preserved({p.device for p in parameters}):
        seed_everything(seed)
        for objective in objectives:
            name, squares = objective.name, []
            for batch in batches:
                loss = objective_losses(perturbed, batch, [objective], {name: 1.0})[name]()
                if not loss.requires_grad:
                    raise ArgumentError(
                        f"the loss of objective {name!r} has no gradient; do not detach it, or leave the objective out"
                    )
                gradient = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
                squares.append(sum(float(g.square().sum()) for g in gradient))
            norm = math.sqrt(sum(squares) / len(squares))
            if norm == 0.0:
                raise ArgumentError(
                    f"the loss of objective {name!r} has no gradient on the encoder, so its weight would have no meaning; "
                    "compute the loss from the encoder's features, or leave the objective out"
                )
            if not math.isfinite(norm):
                raise ArgumentError(
                    f"the gradient of objective {name!r} is not finite on the first batches; correct its loss, or leave the "
                    "objective out"
                )
            norms[name] = norm
    return norms
