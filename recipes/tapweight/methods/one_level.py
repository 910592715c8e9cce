"""Pretraining as a problem of one level, for methods that take no derivative through it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlopt

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

    from ..experiment import Experiment

__all__ = ["one_level"]


def one_level(
    experiment: Experiment,
    module: nn.Module,
    loss: Callable[..., Any],
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
) -> mlopt.Problem:
    """Return pretraining on the batches of the experiment as a problem of one level, "pretraining".

    Args:
        experiment: the batches and the settings.
        module: trained in place.
        loss: takes the module and a batch of the corpus; see `mlopt.Level`.
        optimizer: the factory of the optimiser; the optimiser of pretraining of the settings when None.
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
