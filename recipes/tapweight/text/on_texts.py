"""The part that all tasks on texts share: their splits, their head, their predictor, and remarks on their data."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Literal, Self

import attrs

from mlopt.validation import shown

from ..files import DataError
from ..repetition import shared
from ..task import Split, Task
from .data import Texts, read_table
from .encoder import TextEncoder
from .heads import ClassifierHead, Problem, linear_head
from .predictor import Predictor, outputs_of
from .splitting import content

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Hashable, Mapping, Sequence

    from torch import Tensor, nn

    from ..encoder import Encoder
    from ..labels import Kind, Labels
    from ..predictions import Target
    from ..predictor import Member
    from .batches import Batch, Collate, Example

__all__ = ["HeadName", "OnTexts", "check_texts_of_task"]

HeadName = Literal["linear", "classifier"]


class OnTexts(Task):
    """A task on texts or pairs of texts.

    Args:
        splits: labelled texts of "train", "valid" and "test", after `check_texts_of_task`.
        labels: the meaning of each column of labels.
        read: returns the number, or the numbers, of a cell.
        collate: of the encoder: joins texts into batches.
        several: True if the label of an example is the list of the numbers of all columns, False if it is that of the only one.
        head: "linear" or "classifier".
        dropout: probability of dropping a feature before the linear layer.
        outputs: the number of outputs of the head.
        problem: the name that transformers has for the kind of the labels.
        remarks: sentences about the data, to which those of the files are added.
    """

    splits: Mapping[Split, Sequence[Example]]
    noun = "texts"
    remarks: list[str]

    def __init__(
        self,
        splits: Mapping[Split, Texts],
        labels: Sequence[Labels],
        read: Callable[[Labels, Any], Any],
        collate: Collate,
        *,
        several: bool,
        head: HeadName,
        dropout: float,
        outputs: int,
        problem: Problem,
        remarks: Sequence[str],
    ) -> None:
        super().__init__({split: _encoded(texts, labels, read, several) for split, texts in splits.items()})
        self.collate_texts, self.dropout, self._own_head = collate, dropout, head == "classifier"
        self._count, self._problem = outputs, problem
        notes = [texts.summary() for texts in splits.values() if texts.skipped or texts.notes]
        self.remarks = [*remarks, *notes, *shared(splits, content)]
        by_file: dict[str, list[Example]] = {}
        for split, examples in self.splits.items():
            by_file.setdefault(splits[split].name, []).extend(examples)
        for name, examples in by_file.items():
            self.remarks += collate.remark(examples, name)
        self.skipped = [(texts.source, texts.skipped) for texts in splits.values()]

    @classmethod
    def from_files(
        cls,
        train: str | os.PathLike[str],
        valid: str | os.PathLike[str],
        test: str | os.PathLike[str],
        collate: Collate,
        *,
        text: Sequence[str] | None = None,
        label: str | Sequence[str] | None = None,
        strict: bool = False,
        **options: Any,
    ) -> Self:
        """Read a task from three files.

        Args:
            train, valid, test: tables, see `read_table`.
            collate, options: as in the constructor.
            text, label, strict: as in `read_table`.

        Raises:
            DataError: as in `read_table` and the constructor.
        """
        files = {"train": train, "valid": valid, "test": test}
        texts: Any = {split: read_table(file, text=text, label=label, strict=strict) for split, file in files.items()}
        return cls(texts, collate=collate, **options)

    @abstractmethod
    def target(self) -> Target:
        """Return the meaning of the outputs for a predictor."""

    def collate(self, examples: list[Example]) -> Batch:
        """Join texts into a batch."""
        return self.collate_texts(examples)

    def head(self, encoder: Encoder) -> nn.Module:
        """Build a head to the outputs (B, K)."""
        if not self._own_head:
            return linear_head(encoder.width, self._count, self.dropout)
        assert isinstance(encoder, TextEncoder)
        return ClassifierHead.new(encoder.model, self._count, self._problem)

    def outputs(self, encoder: Encoder, head: nn.Module, batch: Batch) -> Tensor:
        """Return the outputs (B, K) of the head."""
        return outputs_of(encoder, head, batch)

    def targets(self, batch: Batch) -> Tensor:
        """Return the labels of a batch."""
        labels: Tensor = batch["label"]
        return labels

    def keys(self, split: Split) -> Sequence[Hashable]:
        """Return the text, or the two texts, of each example."""
        return [content(example) for example in self.splits[split]]

    def predictor(self, members: Sequence[Member]) -> Predictor | None:
        """Return the predictor of finetuned models; None for encoders of another class than `TextEncoder`."""
        if not all(isinstance(encoder, TextEncoder) for encoder, _ in members):
            return None
        columns = ("text", "text_b") if "text_b" in self.splits["train"][0] else ("text",)
        return Predictor(members, self.target(), columns, getattr(self.splits["train"], "columns", ()))


def check_texts_of_task(splits: Mapping[Split, Texts], kind: Kind | None, head: HeadName) -> None:
    """Check that there are three splits of labelled texts of one form, and options that exist.

    Raises:
        DataError: there are not.
    """
    if set(splits) != {"train", "valid", "test"}:
        raise DataError(f"splits={sorted(splits)}: give 'train', 'valid' and 'test'")
    for texts in splits.values():
        if not all("label" in example for example in texts):
            raise DataError(
                f"{texts.source}: there are no labels, but a task needs them; name their column with --labels"
            )
    pairs = any("text_b" in example for example in splits["train"])
    for split, texts in splits.items():
        if any(("text_b" in example) is not pairs for example in texts):
            here, there = ("single texts", "pairs") if pairs else ("pairs", "single texts")
            raise DataError(f"{texts.source}: '{split}' has {here}, 'train' has {there}; give all the same columns")
    if kind not in (None, "classification", "regression"):
        raise DataError(f"kind={kind!r}: give classification or regression with --kind")
    if head not in ("linear", "classifier"):
        raise DataError(f"head={head!r}: give linear or classifier with --head")


def _encoded(texts: Texts, labels: Sequence[Labels], read: Callable[[Labels, Any], Any], several: bool) -> Texts:
    """Return the texts with their labels as numbers."""
    examples = []
    for row, example, cells in zip(texts.rows, texts.examples, texts.cells(), strict=True):
        values = []
        for meaning, cell in zip(labels, cells, strict=True):
            try:
                values.append(read(meaning, cell))
            except DataError as error:
                place = f"{texts.source}, row {row}, column {shown(meaning.name)}"
                raise DataError(f"{place}: {error}; correct it, or leave the row out") from None
        examples.append({**example, "label": values if several else values[0]})
    return attrs.evolve(texts, examples=tuple(examples))
