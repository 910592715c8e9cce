"""Pretraining as a problem of one level, on any loss or at weights that do not change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import mlopt

from ..models import objective_losses

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    from ..experiment import Experiment
    from ..models import Pretraining

__all__ = ["drawn_passes", "one_level", "pretraining", "weighted_passes"]


def one_level(
    experiment: Experiment,
    module: nn.Module,
    loss: Callable[..., Any],
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
) -> mlopt.Problem:
    """Return the training of a module on the batches of the corpus as a problem of one level, "pretraining".

    Args:
        experiment: the batches, the settings and the number of steps.
        module: trained in place.
        loss: takes the module and a batch; see `mlopt.Level`.
        optimizer: the factory of the optimiser; the settings' optimiser of pretraining when None.
    """
    settings = experiment.settings
    level = mlopt.Level(
        "pretraining",
        module,
        loss,
        data=experiment.batches(),
        optimizer=optimizer or settings.adam(settings.pretraining_lr),
        scheduler=settings.scheduler(experiment.pretraining_steps),
        precision=settings.autocast,
    )
    return mlopt.Problem(level)


def pretraining(
    experiment: Experiment, model: Pretraining, weights: Mapping[str, float], *, drawn: bool = False
) -> mlopt.Problem:
    """Return min_theta sum_k w_k L_k(theta) as a problem, which trains `model` in place.

    Args:
        experiment: the batches, the settings and the number of steps.
        model: theta.
        weights: w, by objective; they sum to one. Objectives of weight zero are not evaluated.
        drawn: if True, each step takes the loss of one objective, drawn with the probabilities w, in place of the weighted sum.
            The expected gradient is the same.
    """
    scales = experiment.scales
    used = [objective for objective in experiment.objectives if weights[objective.name]]
    shares = torch.tensor([weights[objective.name] for objective in used], dtype=torch.float64)

    def weighted(own: Pretraining, batch: Any) -> dict[str, Any]:
        losses = {name: value() for name, value in objective_losses(own, batch, used, scales).items()}
        total: Tensor = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
        return {"loss": total, **{name: value.detach() for name, value in losses.items()}}

    def one(own: Pretraining, batch: Any) -> Tensor:
        objective = used[int(torch.multinomial(shares, 1))]
        return objective_losses(own, batch, [objective], scales)[objective.name]()

    return one_level(experiment, model, one if drawn else weighted)


def weighted_passes(experiment: Experiment, weights: Mapping[str, float]) -> int:
    """Return the cost of a step on the weighted sum: one pass for each view of each objective of positive weight."""
    return sum(objective.passes for objective in experiment.objectives if weights[objective.name])


def drawn_passes(experiment: Experiment, weights: Mapping[str, float]) -> float:
    """Return the expected cost of a step on one objective, drawn with the probabilities w: sum_k w_k (views of k)."""
    return sum(weights[objective.name] * objective.passes for objective in experiment.objectives)
