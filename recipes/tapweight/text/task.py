"""A downstream task on text: predict a class or a number for each text or pair of texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from mlopt.errors import ArgumentError
from mlopt.validation import shown

from ..files import DataError
from ..labels import Form, Kind
from ..metrics import measure_of, measures_of
from ..predictions import Target
from ..task import ClassWeights, Split, balanced_weights, check_class_weights
from .data import Texts
from .on_texts import HeadName, OnTexts, check_texts_of_task
from .splitting import meanings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ..encoder import Encoder
    from ..labels import Labels
    from .batches import Batch, Collate
    from .heads import Problem

__all__ = ["SplitScore", "TextTask"]

#: The metric of a form of labels if none is named.
_DEFAULTS: dict[Form, str] = {"classes": "accuracy", "several": "micro_f1", "numbers": "pearson"}
_PROBLEMS: dict[Form, Problem] = {
    "classes": "single_label_classification",
    "several": "multi_label_classification",
    "numbers": "regression",
}


class SplitScore(Metric):
    """A metric of a whole split, from the outputs of all its batches.

    Args:
        function: the metric of outputs and labels.
        classes: the number of classes; 0 for numbers.
        several: True if a text has any number of classes.
        mean: the mean that standardised numbers are relative to, in the labels' unit.
        std: the unit of standardised numbers, in the labels' unit.
    """

    full_state_update = False
    outputs: list[Tensor]
    labels: list[Tensor]

    def __init__(
        self,
        function: Callable[[Tensor, Tensor], Tensor],
        classes: int,
        several: bool = False,
        mean: float = 0.0,
        std: float = 1.0,
    ) -> None:
        super().__init__()
        self._function, self._classes, self._several, self._mean, self._std = function, classes, several, mean, std
        self.add_state("outputs", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        """Add a batch: logits (B, C) or standardised predictions (B,), and labels, numbers in their unit, (B,).

        Raises:
            ValueError: the shapes do not fit, or an output is not finite.
        """
        _check_shapes(outputs, labels, self._classes, self._several)
        if not outputs.isfinite().all():
            raise ArgumentError("outputs are not finite, so they have no score; lower the learning rate")
        self.outputs.append(outputs.detach().double() * self._std + self._mean)
        self.labels.append(labels if self._classes else labels.double())

    def compute(self) -> Tensor:
        """Return the metric."""
        return self._function(dim_zero_cat(self.outputs), dim_zero_cat(self.labels))


class TextTask(OnTexts):
    """Predict a class of a text, or of a pair of texts, any number of classes, or a number.

    Numbers are standardised by the mean and the (population) standard deviation of the training split.

    Args:
        splits: labelled texts of "train", "valid" and "test".
        collate: of the encoder: joins texts into batches.
        kind: "classification" or "regression"; by default as the training labels are, see `labels_of`.
        metric: the name of a metric of `mlopt.recipes.tapweight.metrics`; by default "accuracy" for classes, "micro_f1" for any
            number of classes, "pearson" for numbers.
        classes: the names of the classes, in the order of the logits; by default those of the training labels.
        remarks: sentences about the data, to which the constructor adds its own.
        dropout: probability of dropping a feature before the head's linear layer.
        head: "linear": a linear layer on the features of a text. "classifier": the head that transformers'
            `AutoModelForSequenceClassification` has for the encoder; that class then loads the predictor of a run.
        class_weights: "balanced" weighs each text in the loss by N / (C N_c), with N training texts, N_c of them of the same
            class, and C classes. "none" does not.

    Attributes:
        form: "classes", "several" or "numbers".
        classes: the names of the classes. Empty for numbers.
        remarks: sentences that a user should read: rows left out, texts of two splits, texts cut off.

    Raises:
        DataError: a label is not one of the classes, not a number, or missing; all labels are the same; the metric of a split is
            undefined; or some texts are pairs and others are not.
    """

    def __init__(
        self,
        splits: Mapping[Split, Texts],
        collate: Collate,
        *,
        kind: Kind | None = None,
        metric: str | None = None,
        classes: Sequence[str] | None = None,
        dropout: float = 0.1,
        head: HeadName = "linear",
        class_weights: ClassWeights = "none",
        remarks: Sequence[str] = (),
    ) -> None:
        check_texts_of_task(splits, kind, head)
        if len(names := splits["train"].label_names) > 1:
            raise DataError(f"{splits['train'].source}: the labels are {', '.join(names)}; MultiTextTask takes several")
        (meaning,) = meanings(splits["train"], kind)
        stated = [] if classes else meaning.remarks()
        if classes:
            meaning = attrs.evolve(
                meaning, form="several" if meaning.form == "several" else "classes", classes=tuple(classes)
            )
        if meaning.form != "numbers" and len(meaning.classes) < 2:
            raise DataError(
                f"{splits['train'].source}: all labels are {meaning.classes[0]!r}, so nothing can be learned; give at "
                "least two classes"
            )
        self.form: Form = "classes" if meaning.form == "binary" else meaning.form
        self.kind: Kind = "regression" if self.form == "numbers" else "classification"
        self.metric_name = _DEFAULTS[self.form] if metric is None else metric
        self.greater_is_better = measure_of(self.metric_name, self.form).greater_is_better
        self.classes, self.label_name = meaning.classes, meaning.name
        super().__init__(
            splits,
            (meaning,),
            _label,
            collate,
            several=False,
            head=head,
            dropout=dropout,
            outputs=len(meaning.classes) or 1,
            problem=_PROBLEMS[self.form],
            remarks=[*remarks, *stated],
        )
        for split, texts in splits.items():
            self._check_metric(split, texts.source)
        labels = [example["label"] for example in self.splits["train"]]
        self.mean, self.std = _standardisation(splits["train"], labels, self.kind)
        self.class_weights = None
        if check_class_weights(class_weights, self.form) == "balanced":
            self.class_weights = balanced_weights(torch.bincount(torch.tensor(labels), minlength=len(self.classes)))

    def outputs(self, encoder: Encoder, head: nn.Module, batch: Batch) -> Tensor:
        """Return logits (B, C), or standardised predictions (B,)."""
        outputs = super().outputs(encoder, head, batch)
        return outputs if self.classes else outputs.squeeze(1)

    def targets(self, batch: Batch) -> Tensor:
        """Return the labels: indices of classes or numbers in their unit (B,), or a 0 or 1 for each class (B, C)."""
        labels: Tensor = batch["label"]
        return labels

    def columns(self, batch: Batch) -> Tensor:
        """Return a 1 in the column of the class and 0 elsewhere (B, C), or standardised labels (B, 1)."""
        labels = self.targets(batch)
        if self.form == "several":
            return labels.double()
        if self.classes:
            return one_hot(labels, len(self.classes)).double()
        return ((labels.double() - self.mean) / self.std)[:, None]

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the loss of each example (B,): the cross entropy, its mean over classes, or the squared error in standard units.

        The losses are in float32 at least.

        Raises:
            ValueError: the outputs are not (B, C) or (B,): a (B, 1) against (B,) would broadcast to (B, B).
        """
        labels = self.targets(batch)
        _check_shapes(outputs, labels, len(self.classes), self.form == "several")
        # Under autocast, outputs have fewer bits than labels need.
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        if self.form == "several":
            return binary_cross_entropy_with_logits(outputs, labels.to(outputs), reduction="none").mean(1)
        if self.classes:
            losses = cross_entropy(outputs, labels, reduction="none")
            return losses if self.class_weights is None else losses * self.class_weights.to(losses)[labels]
        return (outputs - (labels.to(outputs) - self.mean) / self.std).square()

    def metric(self) -> SplitScore:
        """Return a fresh metric."""
        function = measure_of(self.metric_name, self.form).function
        return SplitScore(function, len(self.classes), self.form == "several", self.mean, self.std)

    def measures(self, outputs: Tensor, targets: Tensor) -> dict[str, dict[str, float]]:
        """Return every metric that is defined for the outputs and the labels of a split."""
        outputs = outputs.double()
        if not self.classes:
            outputs, targets = outputs * self.std + self.mean, targets.double()
        return {self.label_name: measures_of(self.form, outputs, targets)}

    def target(self) -> Target:
        """Return the meaning of the outputs for a predictor."""
        if self.form == "several":
            return Target.binary(self.classes)
        if self.classes:
            return Target(form="classes", labels=(self.label_name,), classes=self.classes)
        return Target(form="numbers", labels=(self.label_name,), mean=(self.mean,), std=(self.std,))

    def _check_metric(self, split: Split, source: str) -> None:
        """Check that a split has as many distinct labels as the metric needs."""
        labels = [example["label"] for example in self.splits[split]]
        columns = list(zip(*labels, strict=True)) if self.form == "several" else [labels]
        if max(len(set(column)) for column in columns) < measure_of(self.metric_name, self.form).distinct:
            same = self.classes[labels[0]] if self.form == "classes" else labels[0]
            raise DataError(
                f"{source}: all labels of the {split} split are {shown(same)}, so its {self.metric_name} is undefined; give "
                "another --metric, --split stratified, other --split-fractions, or other files"
            )

    def __repr__(self) -> str:
        sizes = ", ".join(f"{split} {len(examples)}" for split, examples in self.splits.items())
        several = "any of " if self.form == "several" else ""
        target = f"{several}{len(self.classes)} classes" if self.classes else "a number"
        return f"TextTask({self.kind}: {target}; {self.metric_name}; {sizes})"

    def subject(self) -> str:
        """Return the kind of the task and the names of the classes."""
        several = "any of " if self.form == "several" else ""
        return f"{self.kind} into {several}{', '.join(self.classes)}" if self.classes else self.kind


def _check_shapes(outputs: Tensor, labels: Tensor, classes: int, several: bool) -> None:
    expected = (len(labels), classes) if classes else (len(labels),)
    if labels.shape != (expected if several else expected[:1]) or outputs.shape != expected:
        raise ArgumentError(
            f"outputs have the shape {tuple(outputs.shape)} and labels {tuple(labels.shape)}; they must be "
            f"{'(B, C)' if classes else '(B,)'} and {'(B, C)' if several else '(B,)'}"
        )


def _label(meaning: Labels, cell: Any) -> int | float | list[float]:
    """Return a label as a number, or as a 0 or 1 for each of several classes."""
    if meaning.is_missing(cell):
        raise DataError(f"{shown(cell)} is a missing label, which --missing {shown(cell)} leaves out")
    if meaning.form == "several":
        return meaning.indicators(cell)
    return meaning.number(cell) if meaning.form == "numbers" else meaning.index(cell)


def _standardisation(texts: Texts, labels: Sequence[float], kind: Kind) -> tuple[float, float]:
    """Return the mean and the standard deviation of training labels; 0 and 1 for classes."""
    if kind == "classification":
        return 0.0, 1.0
    values = torch.tensor(labels, dtype=torch.float64)
    std = float(values.std(correction=0))
    if std == 0:
        raise DataError(
            f"{texts.source}: all labels are {labels[0]:g}, so nothing can be learned; give another column with --labels"
        )
    return float(values.mean()), std
