"""The predictions of a run for its test split, with the scores of each label; and the records of its splits."""

from __future__ import annotations

import csv
import math
import statistics
from typing import TYPE_CHECKING

import attrs
import torch

from .cells import label_text
from .examples import Examples
from .names import distinct

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from .predictions import Predictions, Target
    from .predictor import Predictor
    from .task import Split, Task

__all__ = ["Tested", "records_of"]

_BATCH_SIZE = 256


@attrs.frozen(kw_only=True, eq=False)
class Tested:
    """The predictions of a predictor for the test split.

    Attributes:
        rows: the row of each example in its file, see `Examples`; its index in the split if there is no file.
        columns: the names of the contents of an example, such as "smiles".
        contents: the contents of each example.
        labels: the labels as text, one for each label of the target; empty if missing.
        predictions: the predictions.
        metric: the name of the metric of the task.
        scores: the metrics that are defined, by label and by name.
    """

    rows: tuple[int, ...]
    columns: tuple[str, ...]
    contents: list[tuple[str, ...]]
    labels: list[list[str]]
    predictions: Predictions
    metric: str
    scores: dict[str, dict[str, float]]

    @classmethod
    def of(cls, predictor: Predictor, task: Task) -> Tested:
        """Predict for the test split of a task, and score each label."""
        examples = task.splits["test"]
        predictions = predictor.predict_examples(examples)
        targets = torch.cat([task.targets(batch) for batch in task.loader("test", _BATCH_SIZE)])
        scores = task.measures(predictor.scored(torch.from_numpy(predictions.values)), targets)
        return cls(
            rows=tuple(getattr(examples, "rows", range(len(examples)))),
            columns=predictor.columns,
            contents=[predictor.contents(example) for example in examples],
            labels=_written(targets, predictor.target),
            predictions=predictions,
            metric=task.metric_name,
            scores=scores,
        )

    @property
    def score(self) -> float:
        """The mean of the metric over the labels for which it is defined."""
        return statistics.fmean(scores[self.metric] for scores in self.scores.values() if self.metric in scores)

    def write(self, file: Path) -> None:
        """Write a row for each example: its row, its contents, its labels, and the predictions."""
        names = self.predictions.target.labels
        with open(file, "w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(distinct(["row", *self.columns, *names, *self.predictions.header]))
            for row, *parts in zip(self.rows, self.contents, self.labels, self.predictions.cells, strict=True):
                writer.writerow([row, *(cell for part in parts for cell in part)])


def records_of(task: Task) -> dict[Split, list[int]] | None:
    """Return the numbers of the records of each split, see `Examples`; None unless all splits are parts of one file."""
    splits = {split: examples for split, examples in task.splits.items() if isinstance(examples, Examples)}
    if len(splits) < len(task.splits) or len({examples.source for examples in splits.values()}) > 1:
        return None
    return {split: list(examples.record_numbers()) for split, examples in splits.items()}


def _written(labels: Tensor, target: Target) -> list[list[str]]:
    """Return labels as text: a class by its name, a number in as many digits as its type has, empty if it is missing.

    Args:
        labels: (N, T) numbers; of classes their indices (N,), or (N, C) with a 1 for the class.
        target: the meaning of the labels.
    """
    if target.form == "numbers":
        rows = labels.reshape(len(labels), -1).tolist()
        return [[label_text(x) for x in row] for row in rows]
    if target.form == "binary":
        return [
            ["" if math.isnan(x) else pair[int(x)] for pair, x in zip(target.pairs, row, strict=True)]
            for row in labels.tolist()
        ]
    if labels.dim() == 1:
        return [[target.classes[int(label)]] for label in labels]
    return [["" if row.isnan().any() else target.classes[int(row.argmax())]] for row in labels]
