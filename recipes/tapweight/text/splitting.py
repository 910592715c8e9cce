"""Divide labelled texts of one file into the splits of a task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ..labels import labels_of, name_of
from ..repetition import repetitions
from ..splits import EIGHT_ONE_ONE, random_split, stratified_split

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..labels import Kind, Labels
    from ..task import Split
    from .batches import Example
    from .data import Texts

__all__ = ["Method", "content", "divided", "meaning_of", "remarks_of"]

Method = Literal["stratified", "random"]


def meaning_of(texts: Texts, kind: Kind | None = None) -> Labels:
    """Return the meaning of the labels of a file.

    Raises:
        DataError: as `labels_of`.
    """
    column = [(row, example["label"]) for row, example in zip(texts.rows, texts.examples, strict=True)]
    return labels_of(texts.source, texts.label_name, column, kind=kind)


def divided(
    texts: Texts,
    meaning: Labels,
    method: Method = "stratified",
    fractions: Sequence[float] = EIGHT_ONE_ONE,
    *,
    seed: int = 0,
) -> dict[Split, list[int]]:
    """Divide labelled texts into train, valid and test; rows of one text stay together.

    Args:
        texts: labelled texts.
        meaning: of their labels.
        method: "stratified": at random, with equal shares of each class, where each text has one class; or "random".
        fractions: of train, valid and test.
        seed: the seed.

    Raises:
        DataError: the fractions are wrong, or a split would be empty.
    """
    groups = [content(example) for example in texts]
    if method == "random" or meaning.form not in ("binary", "classes"):
        return random_split(len(texts), fractions, seed, groups)
    return stratified_split([name_of(example["label"]) for example in texts], fractions, seed, groups)


def content(example: Example) -> tuple[str, ...]:
    """Return the text of an example, or the two of a pair, by which examples are the same."""
    return tuple(example[key].strip() for key in ("text", "text_b") if key in example)


def remarks_of(texts: Texts, meaning: Labels) -> list[str]:
    """Return sentences on how a file and its labels were read, and on texts that are listed more than once."""
    sentences = [texts.summary()] if texts.skipped or texts.notes else []
    sentences += meaning.remarks()
    keys = [" | ".join(content(example)) for example in texts]
    labels = [[name_of(example["label"])] for example in texts]
    return sentences + repetitions(texts, keys, labels, [texts.label_name])
