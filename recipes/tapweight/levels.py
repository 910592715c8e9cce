"""The three levels of TapWeight, the same for every modality: reweighting, finetuning, pretraining.

pretraining   theta*(lambda) = argmin_theta  sum_k lambda_k L_k(theta; unlabelled examples)
finetuning    omega*(theta*) = argmin_omega  L_train(omega) + gamma ||omega - theta*||^2
reweighting   min_lambda  L_valid(omega*(theta*(lambda)))
"""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mlopt

from .proximal import Proximal
from .task import evaluation
from .weights import SimplexWeights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from .objective import Objective
    from .task import Task

__all__ = ["Finetuning", "Parts", "Pretraining", "objective_losses", "task_loss", "three_levels"]


class Pretraining(nn.Module):
    """theta: the encoder, and one head for each objective.

    Args:
        encoder: the encoder; used itself, not a copy.
        objectives: in the order of their weights.
    """

    def __init__(self, encoder: nn.Module, objectives: Sequence[Objective]) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict({objective.name: objective.head(encoder) for objective in objectives})


class Finetuning(nn.Module):
    """omega: a copy of the encoder of its own, and the task's head.

    Args:
        encoder: what is copied.
        task: makes the head.
    """

    def __init__(self, encoder: nn.Module, task: Task) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        self.head = task.head(encoder)


class Parts(tuple[Any, ...]):
    """Batches of validation examples that count as one, whose gradient takes the memory of one of them."""


def objective_losses(
    model: Pretraining, batch: Any, objectives: Sequence[Objective], scales: Mapping[str, float]
) -> dict[str, Callable[[], Tensor]]:
    """Return, by name, functions that compute each objective's loss on its own view of the batch, over its scale."""

    def loss(objective: Objective) -> Tensor:
        value = objective.loss(model.encoder, model.heads[objective.name], objective.view(batch))
        return value / scales[objective.name]

    return {objective.name: partial(loss, objective) for objective in objectives}


def task_loss(model: Finetuning, batch: Any, task: Task) -> Tensor:
    """Return the mean loss of the task on a batch."""
    return _losses(model, batch, task).mean()


def _losses(model: Finetuning, batch: Any, task: Task) -> Tensor:
    return task.losses(task.outputs(model.encoder, model.head, batch), batch)


def _validation_loss(model: Finetuning, batch: Any, task: Task) -> Tensor:
    """Return the mean loss of the task on validation examples, without dropout."""

    def losses(part: Any) -> Tensor:
        with evaluation(model):
            return _losses(model, part, task)

    if not isinstance(batch, Parts):
        return losses(batch).mean()
    return torch.cat([checkpoint(losses, part, use_reentrant=False) for part in batch]).mean()


def three_levels(
    model: Pretraining,
    objectives: Sequence[Objective],
    task: Task,
    *,
    scales: Mapping[str, float],
    gamma: float,
    corpus: Iterable[Any],
    train: Iterable[Any],
    valid: Iterable[Any],
    optimizers: Mapping[str, Callable[..., torch.optim.Optimizer]],
    every: int,
    estimator: mlopt.Estimator,
    schedulers: Mapping[str, Callable[..., Any] | None] | None = None,
    precision: str | None = None,
) -> mlopt.Problem:
    """Return TapWeight's problem.

    Args:
        model: theta, trained in place.
        objectives: in the order of the model's heads.
        task: the downstream task.
        scales: what each objective's loss is divided by.
        gamma: strength of the coupling of the two encoders.
        corpus: batches of unlabelled examples.
        train: batches of labelled examples for finetuning.
        valid: batches of labelled examples for reweighting.
        optimizers: by level name.
        every: pretraining steps for each step on the weights.
        estimator: how finetuning is pulled back; with the identity, no network pass is needed.
        schedulers: by level name, of levels whose learning rate does not stay.
        precision: of the levels' steps, see `mlopt.Level`.
    """

    def pretraining_loss(own: Pretraining, batch: Any, *, reweighting: nn.Module) -> mlopt.Mixture:
        return mlopt.Mixture(objective_losses(own, batch, objectives, scales), weights="reweighting")

    def finetuning_loss(own: Finetuning, batch: Any) -> Tensor:
        return task_loss(own, batch, task)

    def coupling(own: Finetuning, *, pretraining: Pretraining) -> Tensor:
        return proximal(own.encoder, pretraining.encoder)

    def reweighting_loss(own: SimplexWeights, batch: Any, *, finetuning: Finetuning) -> dict[str, Any]:
        loss = _validation_loss(finetuning, batch, task)
        return {"loss": loss, **dict(zip(names, own().detach(), strict=True))}

    schedulers = schedulers or {}
    proximal = Proximal(model.encoder, gamma)
    names = [f"weight/{objective.name}" for objective in objectives]
    device = next(model.parameters()).device
    finetuned = Finetuning(model.encoder, task).to(device)
    return mlopt.Problem(
        mlopt.Level(
            "reweighting",
            SimplexWeights(len(objectives)).to(device),
            reweighting_loss,
            data=valid,
            optimizer=optimizers["reweighting"],
            precision=precision,
        ),
        mlopt.Level(
            "finetuning",
            finetuned,
            finetuning_loss,
            data=train,
            optimizer=optimizers["finetuning"],
            scheduler=schedulers.get("finetuning"),
            precision=precision,
            regularizer=coupling,
            estimator=estimator,
        ),
        mlopt.Level(
            "pretraining",
            model,
            pretraining_loss,
            data=corpus,
            optimizer=optimizers["pretraining"],
            scheduler=schedulers.get("pretraining"),
            precision=precision,
            steps=every,
            estimator=mlopt.Identity(streamed=True),
        ),
    )
