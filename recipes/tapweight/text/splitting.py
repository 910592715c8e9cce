"""Divide labelled texts of one file into the splits of a task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ..cells import is_empty, name_of
from ..labels import check_varied, meanings_of
from ..repetition import repetitions
from ..splits import EIGHT_ONE_ONE, about, random_split, stratified_split

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..labels import Kind, Labels
    from ..task import Split
    from .batches import Example
    from .data import Texts

__all__ = ["Method", "content", "divided", "meanings", "remarks_of"]

Method = Literal["stratified", "random"]


def meanings(texts: Texts, kind: Kind | None = None) -> tuple[Labels, ...]:
    """Return the meaning of each column of labels of a file.

    Raises:
        DataError: as `meanings_of`.
    """
    columns = zip(*texts.cells(), strict=True)
    named = [
        (name, list(zip(texts.rows, column, strict=True)))
        for name, column in zip(texts.label_names, columns, strict=True)
    ]
    return meanings_of(texts.source, named, kind=kind)


def divided(
    texts: Texts,
    labels: Sequence[Labels],
    method: Method = "stratified",
    fractions: Sequence[float] = EIGHT_ONE_ONE,
    *,
    seed: int = 0,
) -> dict[Split, list[int]]:
    """Divide labelled texts into train, valid and test; rows of one text stay together.

    Args:
        texts: labelled texts.
        labels: the meaning of each column of their labels.
        method: "stratified": at random, with equal shares of each class (of several columns, of each combination), where each
            column has one class a text; or "random".
        fractions: of train, valid and test.
        seed: the seed.

    Raises:
        DataError: the fractions are wrong, or a split would be empty.
    """
    groups = [content(example) for example in texts]
    if len(labels) == 1:
        check_varied(texts.source, labels[0].name, (str(cell) for (cell,) in texts.cells()))
    with about(texts.source):
        if method == "random" or any(each.form not in ("binary", "classes") for each in labels):
            return random_split(len(texts), fractions, seed, groups)
        classes = [tuple(map(name_of, cells)) for cells in texts.cells()]
        return stratified_split(classes, fractions, seed, groups, combined=len(labels) > 1)


def content(example: Example) -> tuple[str, ...]:
    """Return the text of an example, or the two of a pair, by which examples are the same."""
    return tuple(example[key].strip() for key in ("text", "text_b") if key in example)


def remarks_of(texts: Texts, labels: Sequence[Labels]) -> list[str]:
    """Return sentences on how a file and its labels were read, and on texts that are listed more than once."""
    sentences = [texts.summary()] if texts.skipped or texts.notes else []
    sentences += [remark for each in labels for remark in each.remarks()]
    keys = [" | ".join(content(example)) for example in texts]
    written = [[None if is_empty(cell) else name_of(cell) for cell in cells] for cells in texts.cells()]
    return sentences + repetitions(texts, keys, written, texts.label_names)
