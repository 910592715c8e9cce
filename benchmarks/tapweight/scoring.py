"""The score of an encoder on a task: by a ridge head on frozen features, or by finetuning the whole encoder."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import mlopt
from mlopt.recipes.tapweight.encoder import Encoder
from mlopt.recipes.tapweight.exact_head import labelled_features, ridge_fit, ridge_leave_one_out
from mlopt.recipes.tapweight.finetuning import finetune
from mlopt.recipes.tapweight.settings import Settings
from mlopt.rng import derive_seed

__all__ = ["full", "plain", "probe"]


def probe(encoder: Encoder, task: Any) -> float:
    """Return the test score of a ridge head on the frozen encoder, fitted on the training and validation examples.

    Args:
        encoder: not changed.
        task: a task whose `kind` is "classification" or "regression".
    """
    train, valid, test = (labelled_features(encoder, task, split) for split in ("train", "valid", "test"))
    features, targets = (torch.cat(parts) for parts in zip(train, valid, strict=True))
    return _ridge(task, features, targets, test[0])


def plain(encoder: Encoder, task: Any, labelled: Tensor, test: Tensor) -> float:
    """Return the test score of the same head on features (n, F) of the labelled and (m, F) of the test examples.

    The encoder only serves to read the targets.
    """
    targets = torch.cat([labelled_features(encoder, task, split)[1] for split in ("train", "valid")])
    return _ridge(task, labelled.to(targets), targets, test.to(targets))


def full(encoder: Encoder, task: Any, settings: Settings, seed: int) -> float:
    """Return the test score of a finetuned copy of the encoder, at the epoch that is best on validation."""
    solve = partial(mlopt.solve, progress=False)

    return finetune(encoder, task, settings, seed=derive_seed(seed, "finetune", 0), solve=solve).score.test


def _ridge(task: Any, features: Tensor, targets: Tensor, test: Tensor) -> float:
    """Return the test score of ridge regression, whose penalty has the least leave-one-out loss on the labelled examples.

    Predictions of numbers are clipped to the range of the labels. Those of classes are not: they would tie.
    """
    penalty = ridge_leave_one_out(features, targets).penalty
    outputs = ridge_fit(features, targets, penalty)(test)
    if task.kind == "regression":
        low, high = (edge(targets.nan_to_num(nan=fill), 0).values for edge, fill in _EDGES)
        outputs = outputs.clamp(low, high)
    metric = task.metric().to(outputs.device)
    labels = torch.cat([task.targets(batch) for batch in task.loader("test", 256)])
    if labels.dim() == 1 and outputs.shape[1] == 1:
        outputs = outputs.squeeze(1)
    metric.update(outputs, labels.to(outputs.device))
    return float(metric.compute())


_EDGES = ((torch.min, float("inf")), (torch.max, float("-inf")))
