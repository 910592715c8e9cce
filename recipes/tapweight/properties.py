"""Several labels of each example, some of which may be missing: their loss, their metrics, and their meaning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from .files import DataError
from .metrics import measure_of, measures_of
from .predictions import Target
from .task import Task, balanced_weights, check_class_weights
from .task_mean import TaskMean, by_task, check_shapes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from .labels import Form
    from .task import ClassWeights, Split

__all__ = ["Properties", "PropertyTask", "Words"]

_DEFAULTS: dict[Form, str] = {"binary": "roc_auc", "classes": "roc_auc", "numbers": "rmse"}


@attrs.frozen(kw_only=True)
class Words:
    """The words of messages.

    Args:
        example: an example, such as "molecule".
        otherwise: the options that divide the examples in another way.
    """

    example: str
    otherwise: str


class Properties:
    """T labels of each example: two classes each, a number each, or the classes of one label. Some may be missing.

    Numbers are standardised, label by label, by the mean and the (population) standard deviation of the training split. Metrics
    are in the labels' unit.

    Args:
        labels: the labels (N, T) of each split: 0 or 1 for classes, NaN if missing.
        names: the T names.
        form: "binary", "numbers", or "classes" if the T columns are the classes of one label.
        words: the words of messages.
        metric: the name of a metric; by default "roc_auc" for classes, "rmse" for numbers. The mean over labels.
        column: the name of the one label of "classes".
        pairs: the names of the classes 0 and 1 of each label of "binary"; by default "0" and "1".
        class_weights: "balanced" weighs each label in the loss by N / (2 N_c): N training examples have it, N_c of them with the
            same class. "none" does not.

    Attributes:
        remarks: sentences that a user should read, such as a split that has one class only.
        mean: (T,) float64, of the training labels; 0 for classes.
        std: (T,) float64, of the training labels; 1 for classes.

    Raises:
        DataError: a split has no label of a name, the metric is undefined, or all training labels of a name are the same number.
    """

    def __init__(
        self,
        labels: Mapping[Split, Tensor],
        names: Sequence[str],
        form: Form,
        words: Words,
        *,
        metric: str | None = None,
        column: str | None = None,
        pairs: Sequence[Sequence[str]] = (),
        class_weights: ClassWeights = "none",
    ) -> None:
        self.names, self.form, self._column, self._pairs = tuple(names), form, column, tuple(pairs)
        self.metric_name = _DEFAULTS[form] if metric is None else metric
        self.greater_is_better = measure_of(self.metric_name, form).greater_is_better
        self.remarks = self._coverage(labels, words)
        self.mean, self.std = self._standardisation(labels["train"])
        self.class_weights = None
        if check_class_weights(class_weights, form) == "balanced":
            own = labels["train"]
            counts = (own == 1).sum(0) if form == "classes" else torch.stack([(own == k).sum(0) for k in (0, 1)])
            self.class_weights = balanced_weights(counts)

    def columns(self, labels: Tensor) -> Tensor:
        """Return standardised labels, or classes as 1 and 0, (B, T); NaN if missing."""
        return (labels - self.mean.to(labels)) / self.std.to(labels)

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss over the labels of each example, 0 for an example without a label.

        Args:
            outputs: (B, T) logits, whose loss is the binary cross-entropy, or the cross-entropy if the columns are the classes of
                one label; or standardised predictions, whose loss is the squared error of standardised labels.
            labels: (B, T) in their unit, NaN if missing.

        Returns:
            (B,) losses, in float32 at least.

        Raises:
            ValueError: the outputs are not (B, T).
        """
        check_shapes(outputs, labels)
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        present = ~labels.isnan()
        # Missing labels are filled before any arithmetic: the gradient of a masked NaN would still be NaN.
        labels = (torch.where(present, labels, 0).to(outputs) - self.mean.to(outputs)) / self.std.to(outputs)
        if self.form == "classes":
            weights = None if self.class_weights is None else (self.class_weights.to(labels) * labels).sum(1)
            losses = cross_entropy(outputs, labels, reduction="none")
            return torch.where(present.all(1), losses if weights is None else losses * weights, 0)
        loss = binary_cross_entropy_with_logits if self.form == "binary" else mse_loss
        losses = torch.where(present, loss(outputs, labels, reduction="none"), 0)
        if self.class_weights is not None:
            negative, positive = self.class_weights.to(losses)
            losses = losses * torch.where(labels > 0.5, positive, negative)
        return losses.sum(dim=1) / present.sum(dim=1).clamp(min=1)

    def metric(self) -> TaskMean:
        """Return a fresh metric in the labels' unit, a mean over labels."""
        return TaskMean(self.metric_name, self.mean, self.std, self.form)

    def measures(self, outputs: Tensor, labels: Tensor) -> dict[str, dict[str, float]]:
        """Return every metric that is defined for the outputs (N, T) and labels (N, T) of a split, label by label."""
        outputs = outputs.double() * self.std.to(outputs.device) + self.mean.to(outputs.device)
        names = self.names if self._column is None else (self._column,)
        parts = by_task(outputs, labels.double(), self.form)
        return {name: measures_of(self.form, *part) for name, part in zip(names, parts, strict=True) if len(part[1])}

    def target(self) -> Target:
        """Return the meaning of the outputs for a predictor."""
        if self._column is not None:
            return Target(form="classes", labels=(self._column,), classes=self.names)
        if self.form == "binary":
            return Target.binary(self.names, self._pairs)
        return Target(form="numbers", labels=self.names, mean=tuple(self.mean.tolist()), std=tuple(self.std.tolist()))

    def _coverage(self, labels: Mapping[Split, Tensor], words: Words) -> list[str]:
        """Check that each split can be scored, and return a sentence on each label that is left out."""
        remarks = []
        # Of the classes of one label, each is a column of 0 and 1.
        needed = 2 if self.form == "classes" else measure_of(self.metric_name, self.form).distinct
        for split, table in labels.items():
            distinct = [column[~column.isnan()].unique() for column in table.T]
            for k, (name, values) in enumerate(zip(self.names, distinct, strict=True)):
                if not len(values):
                    raise DataError(
                        f"task {name!r} has no label in the {split} split; leave it out with --labels, or {words.otherwise}"
                    )
                if len(values) < needed and self.form == "classes":
                    remark = f"no {words.example} of the {split} split is of class {name!r}"
                    remarks.append(remark if not values[0] else "")
                elif len(values) < needed:
                    named = self.form == "binary" and self._pairs
                    label = self._pairs[k][int(values[0])] if named else f"{values[0]:g}"
                    remarks.append(
                        f"task {name!r} has only the label {label} in the {split} split, "
                        f"and is left out of its {self.metric_name}"
                    )
            if all(len(values) < needed for values in distinct):
                raise DataError(
                    f"no task has two classes in the {split} split, so its {self.metric_name} is undefined; "
                    f"{words.otherwise}, or give more {words.example}s"
                )
        return [remark for remark in remarks if remark]

    def _standardisation(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the standard deviation (T,) of training labels (N, T); 0 and 1 for classes."""
        if self.form != "numbers":
            return torch.zeros(labels.shape[1], dtype=torch.float64), torch.ones(labels.shape[1], dtype=torch.float64)
        mean = labels.double().nanmean(dim=0)
        std = (labels.double() - mean).square().nanmean(dim=0).sqrt()
        for name, column in zip(self.names, labels.T, strict=True):
            values = column[~column.isnan()].unique()
            if len(values) == 1:
                raise DataError(
                    f"task {name!r} has one label, {values[0]:g}, throughout the train split, so nothing can be learned; "
                    "leave it out with --labels"
                )
        return mean, std


class PropertyTask(Task):
    """A task whose labels (B, T) are properties. A constructor sets `_properties`."""

    _properties: Properties

    def columns(self, batch: Any) -> Tensor:
        """Return standardised labels, or classes as 1 and 0, (B, T); NaN if missing."""
        return self._properties.columns(self.targets(batch))

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the mean loss over the labels of each example (B,), see `Properties.losses`."""
        return self._properties.losses(outputs, self.targets(batch))

    def metric(self) -> TaskMean:
        """Return a fresh metric in the labels' unit, a mean over properties."""
        return self._properties.metric()

    def measures(self, outputs: Tensor, targets: Tensor) -> dict[str, dict[str, float]]:
        """Return every metric that is defined for the outputs (N, T) and labels (N, T) of a split, label by label."""
        return self._properties.measures(outputs, targets)

    def target(self) -> Target:
        """Return the meaning of the outputs for a predictor."""
        return self._properties.target()
