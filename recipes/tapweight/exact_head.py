"""A head that is fitted exactly: ridge regression on frozen features, with the leave-one-out error of each example."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch

from mlopt.problem import to_device

from .task import evaluation

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from torch import Tensor

    from .encoder import Encoder
    from .task import Split, Task

__all__ = ["LeaveOneOut", "feature_passes", "labelled_features", "labelled_groups", "ridge_fit", "ridge_leave_one_out"]

#: Penalties to choose from, as multiples of the number of examples; the features are standardised.
_PENALTIES = tuple(10.0 ** (exponent / 2) for exponent in range(-8, 7))
_BATCH_SIZE = 256
#: Added to the standard deviation of a feature, so that a constant feature stays zero.
_SMALLEST_DEVIATION = 1e-6


@attrs.frozen(eq=False)
class LeaveOneOut:
    """The leave-one-out error of a ridge regression.

    Attributes:
        predictions: for each row, the prediction of the regression on all other examples, clipped to the range of the labels,
            (n, T).
        losses: the squared error of each of g distinct examples, a mean over the labels of its rows, (g,).
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


def labelled_groups(task: Task, splits: Sequence[Split]) -> Tensor:
    """Return the number of the distinct example in each row of `labelled_features`, from 0 in the order of the rows, (n,)."""
    numbers: dict[Hashable, int] = {}
    keys = (key for split in splits for key in task.keys(split))
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])


def feature_passes(task: Task, splits: Sequence[Split]) -> int:
    """Return how often `labelled_features` evaluates the encoder."""
    return sum(-(-len(task.splits[split]) // _BATCH_SIZE) for split in splits)


def ridge_leave_one_out(features: Tensor, targets: Tensor, groups: Tensor | None = None) -> LeaveOneOut:
    """Return the leave-one-out error of a ridge regression with an intercept, in closed form.

    With Z the features, standardised over all n examples, the hat matrix is H = 1 1^T / n + Z (Z^T Z + a I)^-1 Z^T, and the
    regression on all examples but i predicts y_i - (y_i - (H y)_i) / (1 - H_ii) for example i. An example that is listed more
    than once is left out with all of its rows G, otherwise the regression would have seen it:

        y_G - (I - H_GG)^-1 (y_G - (H y)_G)

    The penalty a is the one with the smallest mean loss among multiples of n.

    Args:
        features: (n, F), n >= 2.
        targets: (n, T); NaN if missing. An example without any label has the loss 0.
        groups: the number of the example in each row, from 0 to g - 1, (n,); None if all rows are different examples.

    Example:
        >>> import torch
        >>> from mlopt.recipes.tapweight.exact_head import ridge_leave_one_out
        >>> features = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None]
        >>> bool(ridge_leave_one_out(features, 3 * features + 1).losses.mean() < 1e-4)
        True

    Source: Allen, "The relationship between variable selection and data augmentation and a method for prediction",
    Technometrics 1974 (the predicted residual sum of squares, PRESS).
    """
    groups = torch.arange(len(features)) if groups is None else groups
    present = ~targets.isnan()
    by_penalty = [torch.zeros_like(targets) for _ in _PENALTIES]
    for rows, columns in _patterns(present):
        for k, predictions in enumerate(_held_out(features[rows], targets[rows][:, columns], groups[rows])):
            by_penalty[k][rows[:, None], columns] = predictions
    counts = _summed(present.sum(1), groups).clamp(min=1)
    errors = [_summed(torch.where(present, p - targets, 0).square().sum(1), groups) / counts for p in by_penalty]
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


def _summed(values: Tensor, groups: Tensor) -> Tensor:
    """Return the sum over the rows of each group, (g,)."""
    return values.new_zeros(int(groups.max()) + 1).index_add(0, groups, values)


def _repeated(groups: Tensor) -> list[Tensor]:
    """Return the rows of the groups of more than one row; those of one size s are the rows of one table (m, s)."""
    _, own, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    rows, size = own.argsort(stable=True), sizes[own]
    return [rows[size[rows] == s].reshape(-1, s) for s in sizes.unique().tolist() if s > 1]


def _held_out(features: Tensor, targets: Tensor, groups: Tensor) -> list[Tensor]:
    """Return the held-out predictions for each penalty, all labels being present."""
    if len(set(groups.tolist())) < 2:
        return [targets for _ in _PENALTIES]
    count, repeated = len(features), _repeated(groups)
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
        errors = residual / (1 - leverage)[:, None]
        for rows in repeated:
            hat = (left[rows] * shares) @ left[rows].mT + 1 / count
            errors[rows] = torch.linalg.solve(torch.eye(rows.shape[1], dtype=hat.dtype) - hat, residual[rows])
        predictions.append((targets - errors).clamp(low, high))
    return predictions
