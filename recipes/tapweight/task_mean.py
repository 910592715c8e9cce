"""The metric of a split: the mean over tasks, some of whose labels may be missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from mlopt.errors import ArgumentError

from .files import DataError
from .metrics import measure_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .labels import Form

__all__ = ["TaskMean", "by_task", "check_shapes"]


class TaskMean(Metric):
    """The mean over tasks of a metric, each on the examples that have its label.

    A task with too few distinct labels for the metric (one class only, for ROC-AUC) is left out.

    Args:
        name: a metric of `METRICS[form]`.
        mean: (T,) the mean that standardised labels are relative to, in the labels' unit.
        std: (T,) the unit of standardised labels, in the labels' unit.
        form: "binary" or "numbers"; or "classes", if the T columns are the classes of one task.
    """

    full_state_update = False
    outputs: list[Tensor]
    labels: list[Tensor]

    def __init__(self, name: str, mean: Tensor, std: Tensor, form: Form = "binary") -> None:
        super().__init__()
        self.name, self.mean, self.std, self.form = name, mean, std, form
        self.add_state("outputs", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            outputs: (B, T) logits, or standardised predictions.
            labels: (B, T) in the labels' unit, NaN if missing.

        Raises:
            ValueError: the shapes differ, or an output is not finite.
        """
        check_shapes(outputs, labels)
        if not outputs.isfinite().all():
            raise ArgumentError("outputs are not finite, so they have no score; lower the learning rate")
        outputs = outputs.detach().to(self.device, torch.float64)
        self.outputs.append(outputs * self.std.to(outputs) + self.mean.to(outputs))
        self.labels.append(labels.to(outputs))

    def compute(self) -> Tensor:
        """Return the mean over the tasks for which the metric is defined."""
        measure = measure_of(self.name, self.form)
        scores = []
        for outputs, labels in by_task(dim_zero_cat(self.outputs), dim_zero_cat(self.labels), self.form):
            if len(torch.unique(labels)) >= measure.distinct:
                scores.append(measure.function(outputs, labels))
        if not scores:
            raise DataError(f"{self.name} is undefined for every task: each needs {measure.distinct} distinct labels")
        return torch.stack(scores).mean()


def by_task(outputs: Tensor, labels: Tensor, form: Form) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield the outputs and the labels of each task, (N,) each, where there is a label; of classes, (N, C) and indices (N,)."""
    if form == "classes":
        present = ~labels.isnan().any(1)
        yield outputs[present], labels[present].argmax(1)
        return
    for own, column in zip(outputs.T, labels.T, strict=True):
        present = ~column.isnan()
        yield own[present], column[present]


def check_shapes(outputs: Tensor, labels: Tensor) -> None:
    """Check that outputs and labels have one shape: broadcasting would hide a difference."""
    if outputs.shape != labels.shape:
        raise ArgumentError(
            f"outputs have the shape {tuple(outputs.shape)} and labels {tuple(labels.shape)}; both must be (B, T)"
        )
