"""A downstream task on text: predict a class or a number for each text or pair of texts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torchmetrics import Metric
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_f1_score,
    multiclass_matthews_corrcoef,
)
from torchmetrics.utilities import dim_zero_cat

from mlopt.errors import ArgumentError
from mlopt.validation import shown

from ..files import DataError
from ..predictions import Target
from ..task import ClassWeights, Split, Task, balanced_weights, check_class_weights
from .data import Texts, read_table
from .encoder import TextEncoder
from .heads import ClassifierHead, linear_head
from .predictor import Predictor, outputs_of

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    from ..encoder import Encoder
    from ..predictor import Member
    from .batches import Batch, Collate, Example

__all__ = ["METRICS", "SplitScore", "TextTask"]

Kind = Literal["classification", "regression"]
#: The name of the label in predictions and scores.
_LABEL = "label"
#: Spellings of a missing number, in any case. Among the names of classes they are names.
_MISSING = ("na", "n/a", "nan", "null")


def _correlation(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Return a correlation of predictions with labels that is 0 if one of the two is constant."""

    def correlation(outputs: Tensor, labels: Tensor, _: int) -> Tensor:
        if (outputs == outputs[0]).all() or (labels == labels[0]).all():
            return outputs.new_zeros(())
        return function(outputs, labels)

    return correlation


def _matthews(outputs: Tensor, labels: Tensor, count: int) -> Tensor:
    """Return the correlation of two classes or more, 0 if all predictions or all labels are one class."""
    predicted = outputs.argmax(1)
    # For two classes torchmetrics returns a small number for 0 / 0, and a constant guess would beat a real one.
    if (predicted == predicted[0]).all() or (labels == labels[0]).all():
        return outputs.new_zeros(())
    return multiclass_matthews_corrcoef(outputs, labels, count)


#: Functions of outputs (N, C) or (N,), labels (N,) and the number of classes. The first of a kind is its default.
METRICS: dict[Kind, dict[str, Callable[[Tensor, Tensor, int], Tensor]]] = {
    "classification": {
        "accuracy": lambda outputs, labels, count: multiclass_accuracy(outputs, labels, count, average="micro"),
        "macro_f1": lambda outputs, labels, count: multiclass_f1_score(outputs, labels, count, average="macro"),
        "micro_f1": lambda outputs, labels, count: multiclass_f1_score(outputs, labels, count, average="micro"),
        "matthews": _matthews,
    },
    "regression": {"pearson": _correlation(pearson_corrcoef), "spearman": _correlation(spearman_corrcoef)},
}


class SplitScore(Metric):
    """A metric of a whole split, from the outputs of all its batches.

    Args:
        function: the metric of outputs, labels and the number of classes.
        classes: the number of classes; 0 for regression.
    """

    full_state_update = False
    outputs: list[Tensor]
    labels: list[Tensor]

    def __init__(self, function: Callable[[Tensor, Tensor, int], Tensor], classes: int) -> None:
        super().__init__()
        self._function, self._classes = function, classes
        self.add_state("outputs", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        """Add a batch: outputs (B, C) or (B,), and labels (B,).

        Raises:
            ValueError: the shapes do not fit, or an output is not finite.
        """
        _check_shapes(outputs, labels, self._classes)
        if not outputs.isfinite().all():
            raise ArgumentError("outputs are not finite, so they have no score; lower the learning rate")
        self.outputs.append(outputs.detach().double())
        self.labels.append(labels if self._classes else labels.double())

    def compute(self) -> Tensor:
        """Return the metric."""
        return self._function(dim_zero_cat(self.outputs), dim_zero_cat(self.labels), self._classes)


class TextTask(Task):
    """Predict a class of a text, or of a pair of texts, or a number.

    Numbers are standardised by the mean and the (population) standard deviation of the training split.

    Args:
        splits: labelled texts of "train", "valid" and "test".
        collate: of the encoder: joins texts into batches.
        kind: "classification", or "regression"; by default regression if the training labels are numbers and not all whole.
        metric: "accuracy" (the default), "macro_f1", "micro_f1" or "matthews" for classification; "pearson" (the default) or
            "spearman" for regression.
        classes: the names of the classes, in the order of the logits; by default those of the training labels.
        dropout: probability of dropping a feature before the head's linear layer.
        head: "linear": a linear layer on the features of a text. "classifier": the head that transformers'
            `AutoModelForSequenceClassification` has for the encoder; that class then loads the predictor of a run.
        class_weights: "balanced" weighs each text in the loss by N / (C N_c), with N training texts, N_c of them of the same
            class, and C classes. "none" does not.

    Attributes:
        classes: the names of the classes. Empty for regression.
        remarks: sentences that a user should read: rows left out, texts of two splits, texts cut off.

    Raises:
        DataError: a label is not one of the classes, not a number, or missing; all labels are the same; or some texts are pairs
            and others are not.
    """

    splits: Mapping[Split, Sequence[Example]]
    noun = "texts"

    def __init__(
        self,
        splits: Mapping[Split, Texts],
        collate: Collate,
        *,
        kind: Kind | None = None,
        metric: str | None = None,
        classes: Sequence[str] | None = None,
        dropout: float = 0.1,
        head: Literal["linear", "classifier"] = "linear",
        class_weights: ClassWeights = "none",
    ) -> None:
        if set(splits) != {"train", "valid", "test"}:
            raise DataError(f"splits={sorted(splits)}: give 'train', 'valid' and 'test'")
        for texts in splits.values():
            if not all("label" in example for example in texts):
                raise DataError(f"{texts.source}: there are no labels; a task needs them")
        pairs = any("text_b" in example for example in splits["train"])
        for split, texts in splits.items():
            if any(("text_b" in example) is not pairs for example in texts):
                here, there = ("single texts", "pairs") if pairs else ("pairs", "single texts")
                raise DataError(f"{texts.source}: '{split}' has {here}, 'train' has {there}; give all the same columns")
        if kind not in (None, *METRICS):
            raise DataError(f"kind={kind!r}: give 'classification' or 'regression'")
        if head not in ("linear", "classifier"):
            raise DataError(f"head={head!r}: give 'linear' or 'classifier'")
        if not classes:
            _check_numbers(splits["train"])
        self.kind: Kind = kind or _infer_kind(splits["train"])
        self.metric_name = metric or next(iter(METRICS[self.kind]))
        if self.metric_name not in METRICS[self.kind]:
            names = " or ".join(map(repr, METRICS[self.kind]))
            raise DataError(f"metric={metric!r} does not fit {self.kind}; give {names}")
        self.greater_is_better = True
        self.classes = (tuple(classes or ()) or _classes(splits["train"])) if self.kind == "classification" else ()
        read = self._class if self.classes else _number
        super().__init__({split: _labelled(texts, read) for split, texts in splits.items()})
        self.collate_texts, self.dropout, self.own_head = collate, dropout, head == "classifier"
        labels = [example["label"] for example in self.splits["train"]]
        self.mean, self.std = _standardisation(splits["train"], labels, self.kind)
        self.class_weights = None
        if check_class_weights(class_weights, self.kind) == "balanced":
            self.class_weights = balanced_weights(torch.bincount(torch.tensor(labels), minlength=len(self.classes)))
        self.remarks = [texts.summary() for texts in splits.values() if texts.skipped] + _shared(splits)
        for split, examples in self.splits.items():
            self.remarks += collate.remark(examples, splits[split].name)

    @classmethod
    def from_files(
        cls,
        train: str | os.PathLike[str],
        valid: str | os.PathLike[str],
        test: str | os.PathLike[str],
        collate: Collate,
        *,
        text: Sequence[str] | None = None,
        label: str = "label",
        strict: bool = False,
        **options: Any,
    ) -> TextTask:
        """Read a task from three files.

        Args:
            train, valid, test: `.csv` or `.jsonl`, gzipped or not.
            collate, options: as in the constructor.
            text, label, strict: as in `read_table`.

        Raises:
            DataError: as in `read_table` and the constructor.
        """
        files = {"train": train, "valid": valid, "test": test}
        texts = {split: read_table(file, text=text, label=label, strict=strict) for split, file in files.items()}
        return cls(texts, collate, **options)  # type: ignore[arg-type]

    def collate(self, examples: list[Example]) -> Batch:
        """Join texts into a batch."""
        return self.collate_texts(examples)

    def head(self, encoder: Encoder) -> nn.Module:
        """Build a head to logits (B, C), or one number (B, 1)."""
        count = len(self.classes) or 1
        if not self.own_head:
            return linear_head(encoder.width, count, self.dropout)
        assert isinstance(encoder, TextEncoder)
        return ClassifierHead.new(encoder.model, count)

    def outputs(self, encoder: Encoder, head: nn.Module, batch: Batch) -> Tensor:
        """Return logits (B, C), or standardised predictions (B,)."""
        outputs = outputs_of(encoder, head, batch)
        return outputs if self.classes else outputs.squeeze(1)

    def targets(self, batch: Batch) -> Tensor:
        """Return the labels (B,): the numbers of classes, or numbers in their unit."""
        labels: Tensor = batch["label"]
        return labels

    def columns(self, batch: Batch) -> Tensor:
        """Return a 1 in the column of the class and 0 elsewhere (B, C), or standardised labels (B, 1)."""
        labels = self.targets(batch)
        if self.classes:
            return one_hot(labels, len(self.classes)).double()
        return ((labels.double() - self.mean) / self.std)[:, None]

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the loss of each example (B,): the cross entropy, or the squared error of standardised labels.

        Raises:
            ValueError: the outputs are not (B, C) or (B,): a (B, 1) against (B,) would broadcast to (B, B).
        """
        labels = self.targets(batch)
        _check_shapes(outputs, labels, len(self.classes))
        if self.classes:
            losses = cross_entropy(outputs, labels, reduction="none")
            return losses if self.class_weights is None else losses * self.class_weights.to(losses)[labels]
        return (outputs - (labels.to(outputs) - self.mean) / self.std).square()

    def metric(self) -> SplitScore:
        """Return a fresh metric."""
        return SplitScore(METRICS[self.kind][self.metric_name], len(self.classes))

    def predictor(self, members: Sequence[Member]) -> Predictor | None:
        """Return the predictor of finetuned models; None for encoders of another class than `TextEncoder`."""
        if not all(isinstance(encoder, TextEncoder) for encoder, _ in members):
            return None
        columns = ("text", "text_b") if "text_b" in self.splits["train"][0] else ("text",)
        if self.classes:
            return Predictor(members, Target(form="classes", labels=(_LABEL,), classes=self.classes), columns)
        target = Target(form="numbers", labels=(_LABEL,), mean=(self.mean,), std=(self.std,))
        return Predictor(members, target, columns)

    def measures(self, outputs: Tensor, targets: Tensor) -> dict[str, dict[str, float]]:
        """Return the metric of the outputs (N, C) or (N,) for labels (N,)."""
        metric = self.metric()
        metric.update(outputs, targets)
        return {_LABEL: {self.metric_name: float(metric.compute())}}

    def __repr__(self) -> str:
        sizes = ", ".join(f"{split} {len(examples)}" for split, examples in self.splits.items())
        target = f"{len(self.classes)} classes" if self.classes else "a number"
        return f"TextTask({self.kind}: {target}; {self.metric_name}; {sizes})"

    def subject(self) -> str:
        """Return the kind of the task and the names of the classes."""
        return f"{self.kind} into {', '.join(self.classes)}" if self.classes else self.kind

    def _class(self, label: Any) -> int:
        name = _name(label)
        if name not in self.classes:
            raise DataError(f"the label {name!r} is not one of the classes, {', '.join(self.classes)}")
        return self.classes.index(name)


def _check_shapes(outputs: Tensor, labels: Tensor, classes: int) -> None:
    expected = (len(labels), classes) if classes else (len(labels),)
    if labels.dim() != 1 or outputs.shape != expected:
        raise ArgumentError(
            f"outputs have the shape {tuple(outputs.shape)} and labels {tuple(labels.shape)}; they must be "
            f"{'(B, C)' if classes else '(B,)'} and (B,)"
        )


def _labelled(texts: Texts, read: Callable[[Any], int | float]) -> Texts:
    """Return the texts with their labels as numbers."""
    examples = []
    for row, example in zip(texts.rows, texts.examples, strict=True):
        try:
            examples.append({**example, "label": read(example["label"])})
        except DataError as error:
            raise DataError(f"{texts.source}, row {row}: {error}; correct it, or leave the row out") from None
    return attrs.evolve(texts, examples=tuple(examples))


def _shared(splits: Mapping[Split, Texts]) -> list[str]:
    """Return a sentence for each other split that shares texts with the training split."""
    train = {(example["text"], example.get("text_b")) for example in splits["train"]}
    remarks = []
    for split in ("valid", "test"):
        count = sum((example["text"], example.get("text_b")) in train for example in splits[split])
        if count:
            remarks.append(f"{count} of {len(splits[split])} {split} texts are among the training texts too")
    return remarks


def _check_numbers(texts: Texts) -> None:
    """Refuse a missing or non-finite label among numbers, which would make a class of every number."""
    values = [_value(example["label"]) for example in texts]
    numbers = [value for value in values if value is not None]
    if len(numbers) == len(values) and any(map(math.isfinite, numbers)):
        _labelled(texts, _number)


def _infer_kind(texts: Texts) -> Kind:
    """Return "regression" if the labels are numbers and not all whole, else "classification"."""
    try:
        numbers = [_number(example["label"]) for example in texts.examples]
    except DataError:
        return "classification"
    return "classification" if all(number.is_integer() for number in numbers) else "regression"


def _classes(texts: Texts) -> tuple[str, ...]:
    """Return the names of the classes, in numerical order if all are whole numbers, else in alphabetical order."""
    names = sorted({_name(example["label"]) for example in texts.examples})
    if len(names) < 2:
        raise DataError(
            f"{texts.source}: all labels are {names[0]!r}: nothing can be learnt; give at least two classes"
        )
    if all(name.removeprefix("-").isdigit() for name in names):
        names.sort(key=int)
    return tuple(names)


def _name(label: Any) -> str:
    """Return the name of a class; 1, 1.0 and "1" have the same name."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return str(label).strip()


def _value(label: Any) -> float | None:
    """Return the number that a label stands for: NaN if it is missing, None if it is a name."""
    if isinstance(label, str) and label.strip().casefold() in _MISSING:
        return math.nan
    # float() accepts digits grouped by underscores.
    if isinstance(label, bool) or (isinstance(label, str) and "_" in label):
        return None
    try:
        return float(label)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        return None


def _number(label: Any) -> float:
    value = _value(label)
    if value is None:
        raise DataError(f"the label {shown(label)} is not a number")
    if math.isnan(value):
        raise DataError(f"the label is missing: {shown(label)} stands in its place")
    if math.isinf(value):
        raise DataError(f"the label {shown(label)} is not finite")
    return value


def _standardisation(texts: Texts, labels: Sequence[float], kind: Kind) -> tuple[float, float]:
    """Return the mean and the standard deviation of training labels; 0 and 1 for classes."""
    if kind == "classification":
        return 0.0, 1.0
    values = torch.tensor(labels, dtype=torch.float64)
    std = float(values.std(correction=0))
    if std == 0:
        raise DataError(f"{texts.source}: all labels are {labels[0]:g}: nothing can be learnt")
    return float(values.mean()), std
