"""Metrics by name, for each form of labels. All that fit a task can be computed at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch
from torchmetrics.functional import (
    mean_absolute_error,
    mean_squared_error,
    pearson_corrcoef,
    r2_score,
    spearman_corrcoef,
)
from torchmetrics.functional.classification import (
    binary_accuracy,
    binary_auroc,
    binary_average_precision,
    binary_f1_score,
    binary_matthews_corrcoef,
    multiclass_accuracy,
    multiclass_f1_score,
    multiclass_matthews_corrcoef,
    multilabel_accuracy,
    multilabel_f1_score,
)

from .files import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from .labels import Form

__all__ = ["METRICS", "Measure", "MetricName", "measure_of", "measures_of"]

MetricName = Literal[
    "roc_auc", "pr_auc", "accuracy", "f1", "macro_f1", "micro_f1", "matthews", "rmse", "mae", "r2", "pearson", "spearman"
]  # fmt: skip


@attrs.frozen
class Measure:
    """A metric.

    Args:
        function: of outputs and labels; see `METRICS` for their shapes.
        greater_is_better: True if a larger value is better.
        distinct: the number of distinct labels, in any column, without which the metric is undefined.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    greater_is_better: bool = True
    distinct: int = 1


def _ranked(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a metric of scores (N,) on any scale, for labels 0 and 1 (N,), that depends on their order only."""

    def ranked(outputs: Tensor, labels: Tensor) -> Tensor:
        # Ranks give the same value, and exactly so: torchmetrics would take a sigmoid of logits, which ties the large ones.
        ranks = torch.unique(outputs, return_inverse=True)[1]
        return function(ranks.double() / len(ranks), labels.long())

    return ranked


_roc_auc, _pr_auc = _ranked(binary_auroc), _ranked(binary_average_precision)


def _of_signs(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a metric of the classes that logits (N,) predict by their sign, for labels 0 and 1 (N,)."""
    return lambda outputs, labels: function((outputs > 0).long(), labels.long())


def _binary_matthews(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the correlation of predicted and true classes, 0 if one of the two is constant."""
    predicted = (outputs > 0).long()
    if (predicted == predicted[0]).all() or (labels == labels[0]).all():
        return outputs.new_zeros(())
    return binary_matthews_corrcoef(predicted, labels.long())


def _matthews(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the correlation of two classes or more, 0 if all predictions or all labels are one class."""
    predicted = outputs.argmax(1)
    # For two classes torchmetrics returns a small number for 0 / 0, and a constant guess would beat a real one.
    if (predicted == predicted[0]).all() or (labels == labels[0]).all():
        return outputs.new_zeros(())
    return multiclass_matthews_corrcoef(outputs, labels, outputs.shape[1])


def _f1(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the F1 of the second of two classes, the mean over classes if there are more."""
    if outputs.shape[1] == 2:
        return binary_f1_score(outputs.argmax(1), labels)
    return multiclass_f1_score(outputs, labels, outputs.shape[1], average="macro")


def _each_against_the_rest(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a metric of logits (N, C) and classes (N,): that of the second of two classes; of more, the mean over classes."""

    def mean(outputs: Tensor, labels: Tensor) -> Tensor:
        count = outputs.shape[1]
        outputs = outputs.double()
        others = [torch.cat([outputs[:, :k], outputs[:, k + 1 :]], 1).logsumexp(1) for k in range(count)]
        # The logarithm of the odds has the order of the probability, without ties at 1.
        scores = [function(outputs[:, k] - others[k], labels == k) for k in range(count) if (labels == k).any()]
        return function(outputs[:, 1] - others[1], labels == 1) if count == 2 else torch.stack(scores).mean()

    return mean


def _over_columns(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the mean of a metric over the columns of logits (N, C) and labels (N, C) that hold both 0 and 1."""

    def mean(outputs: Tensor, labels: Tensor) -> Tensor:
        both = [k for k, column in enumerate(labels.T) if len(column.unique()) == 2]
        scores = [function(outputs[:, k], labels[:, k]) for k in both]
        return torch.stack(scores).mean() if scores else outputs.new_full((), torch.nan)

    return mean


def _correlation(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a correlation of predictions with labels that is 0 if one of the two is constant."""

    def correlation(outputs: Tensor, labels: Tensor) -> Tensor:
        if (outputs == outputs[0]).all() or (labels == labels[0]).all():
            return outputs.new_zeros(())
        return function(outputs, labels)

    return correlation


def _of_classes(function: Callable[..., Tensor], average: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda outputs, labels: function(outputs, labels, outputs.shape[1], average=average)


def _of_several(function: Callable[..., Tensor], average: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda outputs, labels: function((outputs > 0).long(), labels.long(), outputs.shape[1], average=average)


#: The metrics of each form of labels. Outputs and labels are: for "binary", logits (N,) and 0 or 1 (N,); for "classes", logits
#: (N, C) and indices (N,); for "several", logits (N, C) and 0 or 1 (N, C); for "numbers", predictions (N,) and numbers (N,).
METRICS: dict[Form, dict[str, Measure]] = {
    "binary": {
        "roc_auc": Measure(_roc_auc, distinct=2),
        "pr_auc": Measure(_pr_auc, distinct=2),
        "accuracy": Measure(_of_signs(binary_accuracy)),
        "f1": Measure(_of_signs(binary_f1_score)),
        "matthews": Measure(_binary_matthews),
    },
    "classes": {
        "accuracy": Measure(_of_classes(multiclass_accuracy, "micro")),
        "macro_f1": Measure(_of_classes(multiclass_f1_score, "macro")),
        "micro_f1": Measure(_of_classes(multiclass_f1_score, "micro")),
        "f1": Measure(_f1),
        "matthews": Measure(_matthews),
        "roc_auc": Measure(_each_against_the_rest(_roc_auc), distinct=2),
        "pr_auc": Measure(_each_against_the_rest(_pr_auc), distinct=2),
    },
    "several": {
        "micro_f1": Measure(_of_several(multilabel_f1_score, "micro")),
        "macro_f1": Measure(_of_several(multilabel_f1_score, "macro")),
        "accuracy": Measure(_of_several(multilabel_accuracy, "micro")),
        "roc_auc": Measure(_over_columns(_roc_auc), distinct=2),
        "pr_auc": Measure(_over_columns(_pr_auc), distinct=2),
    },
    "numbers": {
        "rmse": Measure(
            lambda outputs, labels: mean_squared_error(outputs, labels, squared=False), greater_is_better=False
        ),
        "mae": Measure(mean_absolute_error, greater_is_better=False),
        "r2": Measure(r2_score, distinct=2),
        "pearson": Measure(_correlation(pearson_corrcoef)),
        "spearman": Measure(_correlation(spearman_corrcoef)),
    },
}


def measure_of(name: str, form: Form) -> Measure:
    """Return the metric of a name.

    Raises:
        DataError: the metric does not fit the form of the labels.
    """
    if name not in METRICS[form]:
        kind, names = "regression" if form == "numbers" else "classification", " or ".join(map(repr, METRICS[form]))
        raise DataError(f"metric={name!r} does not fit {kind}; give {names} with --metric")
    return METRICS[form][name]


def measures_of(form: Form, outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """Return every metric that is defined for some outputs and labels, by its name.

    Args:
        form: the form of the labels.
        outputs, labels: in the shapes of `METRICS`.

    Example:
        >>> import torch
        >>> from mlopt.recipes.tapweight.metrics import measures_of
        >>> scores = measures_of("numbers", torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 2.0, 3.0]))
        >>> {name: round(score, 3) for name, score in scores.items()}
        {'rmse': 0.577, 'mae': 0.333, 'r2': 0.5, 'pearson': 0.982, 'spearman': 1.0}
    """
    distinct = len(torch.unique(labels))
    defined = {name: measure for name, measure in METRICS[form].items() if distinct >= measure.distinct}
    values: dict[str, Any] = {name: float(measure.function(outputs, labels)) for name, measure in defined.items()}
    return {name: value for name, value in values.items() if value == value}
