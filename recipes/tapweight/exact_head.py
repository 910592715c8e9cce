"""A head that is fitted exactly: ridge regression on frozen features, with the leave-one-out error of each example."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch

from mlopt.problem import to_device

from .task import evaluation

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from .encoder import Encoder
    from .task import Split, Task

__all__ = ["LeaveOneOut", "feature_passes", "labelled_features", "ridge_fit", "ridge_leave_one_out"]

#: Penalties to choose from, as multiples of the number of examples; the features are standardised.
_PENALTIES = tuple(10.0 ** (exponent / 2) for exponent in range(-8, 7))
_BATCH_SIZE = 256
#: Added to the standard deviation of a feature, so that a constant feature stays zero.
_SMALLEST_DEVIATION = 1e-6


@attrs.frozen(eq=False)
class LeaveOneOut:
    """The leave-one-out error of a ridge regression.

    Attributes:
        predictions: for each example, the prediction of the regression on all others, clipped to the range of the labels,
            (n, T).
        losses: the squared error of each example, a mean over its labels, (n,).
        penalty: the penalty of the smallest mean loss.
    """

    predictions: Tensor
    losses: Tensor
    penalty: float


def labelled_features(encoder: Encoder, task: Task, splits: Sequence[Split]) -> tuple[Tensor, Tensor]:
    """Return the frozen features and the targets of labelled examples.

    Args:
        encoder: evaluated in eval mode; its modes are restored.
        task: the task.
        splits: the splits whose examples are taken, in this order.

    Returns:
        Features (n, F) and targets (n, T), see `Task.columns`, both in float64 on the CPU.
    """
    device = next(encoder.parameters()).device
    features, targets = [], []
    with evaluation(encoder), torch.no_grad():
        for split in splits:
            for batch in task.loader(split, _BATCH_SIZE):
                batch = to_device(batch, device)
                features.append(encoder.pool(batch).double().cpu())
                targets.append(task.columns(batch).double().cpu())
    return torch.cat(features), torch.cat(targets)


def feature_passes(task: Task, splits: Sequence[Split]) -> int:
    """Return how often `labelled_features` evaluates the encoder."""
    return sum(-(-len(task.splits[split]) // _BATCH_SIZE) for split in splits)


def ridge_leave_one_out(features: Tensor, targets: Tensor) -> LeaveOneOut:
    """Return the leave-one-out error of a ridge regression with an intercept, in closed form.

    With Z the features, standardised over all n examples, the hat matrix is H = 1 1^T / n + Z (Z^T Z + a I)^-1 Z^T, and the
    regression on all examples but i predicts y_i - (y_i - (H y)_i) / (1 - H_ii) for example i. The penalty a is the one with
    the smallest mean loss among multiples of n.

    Args:
        features: (n, F), n >= 2.
        targets: (n, T); NaN if missing. An example without any label has the loss 0.

    Example:
        >>> import torch
        >>> from mlopt.recipes.tapweight.exact_head import ridge_leave_one_out
        >>> features = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None]
        >>> bool(ridge_leave_one_out(features, 3 * features + 1).losses.mean() < 1e-4)
        True

    Source: Allen, "The relationship between variable selection and data augmentation and a method for prediction",
    Technometrics 1974 (the predicted residual sum of squares, PRESS).
    """
    present = ~targets.isnan()
    by_penalty = [torch.zeros_like(targets) for _ in _PENALTIES]
    for rows, columns in _patterns(present):
        for k, predictions in enumerate(_held_out(features[rows], targets[rows][:, columns])):
            by_penalty[k][rows[:, None], columns] = predictions
    counts = present.sum(1).clamp(min=1)
    errors = [torch.where(present, p - targets, 0).square().sum(1) / counts for p in by_penalty]
    best = min(range(len(_PENALTIES)), key=lambda k: float(errors[k].mean()))
    return LeaveOneOut(by_penalty[best], errors[best], _PENALTIES[best])


def ridge_fit(features: Tensor, targets: Tensor, penalty: float, *, clip: bool = True) -> Callable[[Tensor], Tensor]:
    """Fit a ridge regression with an intercept.

    Args:
        features: (n, F).
        targets: (n, T); NaN if missing.
        penalty: the penalty, a multiple of the number of examples, see `LeaveOneOut`.
        clip: clip the predictions to the range of the labels. A ranking of examples needs them as they are.

    Returns:
        The function from features (m, F) to predictions (m, T), which are 0 in a column without labels.
    """
    fits = []
    for rows, columns in _patterns(~targets.isnan()):
        if not len(rows):
            continue
        own, labels = features[rows], targets[rows][:, columns]
        mean, deviation = own.mean(0), own.std(0, correction=0) + _SMALLEST_DEVIATION
        left, values, right = torch.linalg.svd((own - mean) / deviation, full_matrices=False)
        shrunk = values / (values.square() + penalty * len(own))
        coefficients = right.T @ (shrunk[:, None] * (left.T @ (labels - labels.mean(0))))
        fits.append((columns, mean, deviation, coefficients, labels))

    def predict(new: Tensor) -> Tensor:
        predictions = new.new_zeros(len(new), targets.shape[1])
        for columns, mean, deviation, coefficients, labels in fits:
            raw = labels.mean(0) + (new - mean) / deviation @ coefficients
            predictions[:, columns] = raw.clamp(labels.amin(0), labels.amax(0)) if clip else raw
        return predictions

    return predict


def _patterns(present: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return groups of columns whose labels are present in the same rows, as indices of the rows and of the columns."""
    patterns, group = torch.unique(present, dim=1, return_inverse=True)
    return [(patterns[:, k].nonzero().squeeze(1), (group == k).nonzero().squeeze(1)) for k in range(patterns.shape[1])]


def _held_out(features: Tensor, targets: Tensor) -> list[Tensor]:
    """Return the held-out predictions for each penalty, all labels being present."""
    count = len(features)
    if count < 2:
        return [targets for _ in _PENALTIES]
    standardised = (features - features.mean(0)) / (features.std(0, correction=0) + _SMALLEST_DEVIATION)
    left, values, _ = torch.linalg.svd(standardised, full_matrices=False)
    centred = targets - targets.mean(0)
    projected = left.T @ centred
    low, high = targets.amin(0), targets.amax(0)
    predictions = []
    for penalty in _PENALTIES:
        shares = values.square() / (values.square() + penalty * count)
        leverage = left.square() @ shares + 1 / count
        residual = centred - left @ (shares[:, None] * projected)
        predictions.append((targets - residual / (1 - leverage)[:, None]).clamp(low, high))
    return predictions
