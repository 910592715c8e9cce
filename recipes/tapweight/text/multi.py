"""A task on texts with several columns of labels, some of which may be missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..files import DataError
from ..properties import Properties, PropertyTask, Words
from .on_texts import HeadName, OnTexts, check_texts_of_task
from .splitting import meanings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..labels import Form, Kind, Labels
    from ..task import ClassWeights, Split
    from .batches import Collate
    from .data import Texts

__all__ = ["MultiTextTask"]

_WORDS = Words(example="text", otherwise="give --split random or stratified, other --split-fractions, or other files")


class MultiTextTask(PropertyTask, OnTexts):
    """Predict several labels of a text, or of a pair of texts: two classes each, or a number each. Some may be missing.

    Args:
        splits: labelled texts of "train", "valid" and "test", with the same columns of labels.
        collate: of the encoder: joins texts into batches.
        kind: "classification" or "regression"; by default as the training labels are, see `meanings_of`.
        labels: the meaning of each column of labels; by default that of the training texts.
        metric: the name of a metric of `mlopt.recipes.tapweight.metrics`; by default "roc_auc" for classes, "rmse" for numbers.
            The mean over the columns.
        dropout: probability of dropping a feature before the head's linear layer.
        head: "linear" or "classifier", as in `TextTask`; the latter has one logit for each column.
        class_weights: "balanced" weighs each label in the loss by N / (2 N_c), see `Properties`. "none" does not.
        remarks: sentences about the data, to which the constructor adds its own.

    Attributes:
        form: "binary" or "numbers".
        label_names: the columns of labels.
        remarks: sentences that a user should read.

    Raises:
        DataError: the columns are of different kinds, a cell does not fit its column, or a split has no label of a column.
    """

    def __init__(
        self,
        splits: Mapping[Split, Texts],
        collate: Collate,
        *,
        kind: Kind | None = None,
        labels: Sequence[Labels] | None = None,
        metric: str | None = None,
        dropout: float = 0.1,
        head: HeadName = "linear",
        class_weights: ClassWeights = "none",
        remarks: Sequence[str] = (),
    ) -> None:
        check_texts_of_task(splits, kind, head)
        train = splits["train"]
        for texts in splits.values():
            if [*map(str.casefold, texts.label_names)] != [*map(str.casefold, train.label_names)]:
                raise DataError(
                    f"{texts.source}: the labels are {', '.join(texts.label_names)}, but those of {train.source} "
                    f"are {', '.join(train.label_names)}; give the same columns"
                )
        stated = [] if labels else [remark for each in meanings(train, kind) for remark in each.remarks()]
        labels = labels or meanings(train, kind)
        if unfit := next((each for each in labels if each.form not in ("binary", "numbers")), None):
            raise DataError(f"{train.source}: {unfit.summary()}; TextTask takes such a column alone")
        self.form: Form = labels[0].form
        self.kind: Kind = "regression" if self.form == "numbers" else "classification"
        self.label_names = tuple(each.name for each in labels)
        super().__init__(
            splits,
            labels,
            lambda meaning, cell: meaning.value(cell),
            collate,
            several=True,
            head=head,
            dropout=dropout,
            outputs=len(labels),
            problem="regression" if self.form == "numbers" else "multi_label_classification",
            remarks=[*remarks, *stated],
        )
        self._properties = Properties(
            {split: torch.tensor([e["label"] for e in examples]) for split, examples in self.splits.items()},
            self.label_names,
            self.form,
            _WORDS,
            metric=metric,
            pairs=[each.classes for each in labels],
            class_weights=class_weights,
        )
        self.metric_name, self.greater_is_better = self._properties.metric_name, self._properties.greater_is_better
        self.remarks += self._properties.remarks

    def __repr__(self) -> str:
        sizes = ", ".join(f"{split} {len(examples)}" for split, examples in self.splits.items())
        return f"MultiTextTask({self.subject()}; {self.metric_name}; {sizes})"

    def subject(self) -> str:
        """Return the kind of the task and the names of the labels."""
        return f"{self.kind} of {', '.join(self.label_names)}"
