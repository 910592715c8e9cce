"""The three levels of TapWeight, the same for every modality: reweighting, finetuning, pretraining.

pretraining   theta*(lambda) = argmin_theta  sum_k lambda_k L_k(theta; unlabelled examples)
finetuning    omega*(theta*) = argmin_omega  L_train(omega) + gamma ||omega - theta*||^2
reweighting   min_lambda  L_valid(omega*(theta*(lambda)))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mlopt

from ..models import Finetuning, objective_losses, task_losses
from ..task import evaluation
from .proximal import Coupling, Proximal
from .weights import SimplexWeights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from ..models import Pretraining
    from ..objective import Objective
    from ..task import Task

__all__ = ["Chunks", "three_levels"]


class Chunks(tuple[Any, ...]):
    """Batches of validation examples that count as one, whose gradient takes the memory of one of them."""


def _validation_loss(model: Finetuning, batch: Any, task: Task) -> Tensor:
    """Return the mean loss of the task on validation examples, without dropout."""

    def losses(chunk: Any) -> Tensor:
        with evaluation(model):
            return task_losses(model, chunk, task)

    if not isinstance(batch, Chunks):
        return losses(batch).mean()
    return torch.cat([checkpoint(losses, chunk, use_reentrant=False) for chunk in batch]).mean()


def three_levels(
    model: Pretraining,
    objectives: Sequence[Objective],
    task: Task,
    *,
    scales: Mapping[str, float],
    gamma: float,
    proximal: str = "l2",
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
        scales: the number that each objective's loss is divided by.
        gamma: strength of the coupling of the two encoders.
        proximal: its distance, a key of `DISTANCES`.
        corpus: batches of unlabelled examples.
        train: batches of labelled examples for finetuning.
        valid: batches of labelled examples for reweighting.
        optimizers: by level name.
        every: pretraining steps for each step on the weights.
        estimator: how finetuning is pulled back; with the identity, no network pass is needed.
        schedulers: by level name, for levels whose learning rate is not constant.
        precision: the precision of the levels' steps, see `mlopt.Level`.
    """

    def pretraining_loss(own: Pretraining, batch: Any, *, reweighting: nn.Module) -> mlopt.Mixture:
        return mlopt.Mixture(objective_losses(own, batch, objectives, scales), weights="reweighting")

    def finetuning_loss(own: Finetuning, batch: Any) -> Tensor:
        return task_losses(own, batch, task).mean()

    def reweighting_loss(own: SimplexWeights, batch: Any, *, finetuning: Finetuning) -> dict[str, Any]:
        loss = _validation_loss(finetuning, batch, task)
        return {"loss": loss, **dict(zip(names, own().detach(), strict=True))}

    schedulers = schedulers or {}
    names = [f"weight/{objective.name}" for objective in objectives]
    device = next(model.parameters()).device
    finetuned = Finetuning(model.encoder, task).to(device)
    coupling = Coupling(Proximal(model.encoder, gamma, proximal), finetuned, model)

    def training(level: str) -> dict[str, Any]:
        return {"optimizer": optimizers[level], "scheduler": schedulers.get(level), "precision": precision}

    weights = SimplexWeights(len(objectives)).to(device)
    identity = mlopt.Identity(streamed=True)
    return mlopt.Problem(
        mlopt.Level("reweighting", weights, reweighting_loss, data=valid, **training("reweighting")),
        mlopt.Level(
            "finetuning",
            finetuned,
            finetuning_loss,
            data=train,
            regularizer=coupling,
            estimator=estimator,
            **training("finetuning"),
        ),
        mlopt.Level(
            "pretraining",
            model,
            pretraining_loss,
            data=corpus,
            steps=every,
            estimator=identity,
            **training("pretraining"),
        ),
    )
