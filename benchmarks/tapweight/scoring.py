"""The score of an encoder on a task: by a ridge head on frozen features, or by finetuning the whole encoder."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

import mlopt
from mlopt.recipes.tapweight.exact_head import labelled_features, labelled_groups, ridge_fit, ridge_leave_one_out
from mlopt.recipes.tapweight.finetuning import finetune
from mlopt.rng import derive_seed

if TYPE_CHECKING:
    from torch import Tensor

    from mlopt.recipes.tapweight.encoder import Encoder
    from mlopt.recipes.tapweight.settings import Settings
    from mlopt.recipes.tapweight.task import Task

__all__ = ["full", "plain", "probe"]


def probe(encoder: Encoder, task: Task) -> float:
    """Return the test score of a ridge head on the frozen encoder, fitted on the training and validation examples."""
    return _ridge(
        task, *labelled_features(encoder, task, ["train", "valid"]), labelled_features(encoder, task, ["test"])[0]
    )


def plain(encoder: Encoder, task: Task, labelled: Tensor, test: Tensor) -> float:
    """Return the test score of the same head on features (n, F) of the labelled and (m, F) of the test examples.

    The encoder only serves to read the targets.
    """
    _, targets = labelled_features(encoder, task, ["train", "valid"])
    return _ridge(task, labelled.to(targets), targets, test.to(targets))


def full(encoder: Encoder, task: Task, settings: Settings, seed: int) -> float:
    """Return the test score of a finetuned copy of the encoder, at the epoch that is best on validation."""
    solve = partial(mlopt.solve, progress=False)
    return finetune(encoder, task, settings, seed=derive_seed(seed, "finetune", 0), solve=solve).score.test


def _ridge(task: Task, features: Tensor, targets: Tensor, test: Tensor) -> float:
    """Return the test score of ridge regression, whose penalty has the least leave-one-out loss on the labelled examples."""
    groups = labelled_groups(task, ["train", "valid"])
    penalty = ridge_leave_one_out(features, targets, groups).penalty
    # Outputs for classes are ranked, or compared with each other: clipping would tie some of them.
    outputs = ridge_fit(features, targets, penalty, clip=task.kind == "regression")(test)  # type: ignore[attr-defined]
    labels = torch.cat([task.targets(batch) for batch in task.loader("test", 256)])
    if labels.dim() == 1 and outputs.shape[1] == 1:
        outputs = outputs.squeeze(1)
    metric = task.metric()
    metric.update(outputs, labels)
    return float(metric.compute())
