"""Read text from files of documents, labelled tables and data sets; report every row that is left out."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from mlopt.validation import shown

from ..cells import is_empty
from ..examples import Examples, UnusableError, check_limit, gather
from ..files import DataError, suffix_of
from ..names import suggestion
from ..tables import SUFFIXES, column_of, is_folder, list_of, table_of
from .sentences import split_sentences

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from ..tables import Table
    from .batches import Example

__all__ = ["Sentences", "Texts", "check_texts", "from_dataset", "read_corpus", "read_table", "read_texts"]

_LISTS = (".txt",)
#: JSON can write a character in two parts; a truncated text may hold one of them, which no tokenizer accepts.
_SURROGATE = re.compile("[\ud800-\udfff]")
#: The columns of text to look for if none are named.
_USUAL = (("text",), ("text_a", "text_b"), ("sentence",), ("sentence1", "sentence2"))


@attrs.frozen(eq=False, repr=False, kw_only=True)
class Texts(Examples["Example"]):
    """The texts of one file or data set, in its order.

    Each example has "text", for a pair of texts also "text_b", and, if there are labels, "label": the cell of the file, or a
    tuple of the cells of several columns, with None for a missing label.

    Args:
        label_names: the columns of the labels.
    """

    label_names: tuple[str, ...] = ("label",)

    noun = "texts"

    def contents(self) -> list[str]:
        """Return the texts, those of a pair one after the other."""
        return [text for example in self.examples for text in _texts(example)]

    def copy(self) -> Texts:
        """Return the same texts in examples of their own, to which objectives may attach targets."""
        return attrs.evolve(self, examples=tuple(dict(example) for example in self.examples))

    def cells(self) -> list[tuple[Any, ...]]:
        """Return the labels of each example, one for each column."""
        several = len(self.label_names) > 1
        return [tuple(example["label"]) if several else (example["label"],) for example in self.examples]

    def unlabelled(self) -> Texts:
        """Return every distinct text without labels, the two of a pair separately: a corpus of the task's own texts."""
        rows = {text: row for example, row in zip(self.examples, self.rows, strict=True) for text in _texts(example)}
        return Texts(examples=tuple({"text": text} for text in rows), rows=tuple(rows.values()), source=self.source)

    def sentences(self) -> Sentences:
        """Return the sentences of every text, in order: a corpus for objectives that need places in documents.

        Example:
            >>> from mlopt.recipes.tapweight.text import read_corpus
            >>> with open("documents.txt", "w") as file:
            ...     file.writelines(["Rates are high. We lower them.\\n", "Nets are deep.\\n"])
            >>> read_corpus("documents.txt").sentences()[1]
            {'text': 'We lower them.', 'document': 0, 'position': 1, 'count': 2}
        """
        examples: list[Example] = []
        rows: list[int] = []
        for document, (example, row) in enumerate(zip(self.examples, self.rows, strict=True)):
            parts = split_sentences(example["text"])
            for position, part in enumerate(parts):
                examples.append({"text": part, "document": document, "position": position, "count": len(parts)})
                rows.append(row)
        return Sentences(examples=tuple(examples), rows=tuple(rows), skipped=self.skipped, source=self.source)


class Sentences(Texts):
    """The sentences of the texts of one file or data set, in its order.

    Each example has "text"; "document", the index of its text in the file; "position", its index in that text; and "count", the
    number of sentences of that text.
    """

    noun = "sentences"


def read_corpus(
    source: str | os.PathLike[str] | Any, *, column: str | None = None, strict: bool = False, limit: int | None = None
) -> Texts:
    """Read an unlabelled corpus.

    Args:
        source: `.txt` with a document a line (blank lines are skipped), also compressed (.gz, .xz, .bz2, .zip); or a table with a
            column of text, see `mlopt.recipes.tapweight.tables.table_of`.
        column: the column of the texts of a table; by default "text", else "sentence", else the only column.
        strict: refuse a text of a table that is empty or not Unicode, instead of leaving it out.
        limit: stop after so many texts; at least 2.

    Returns:
        At least two texts.

    Raises:
        DataError: the file cannot be used; the message names the file, the row, its content and the remedy.
        FileNotFoundError: there is no such file.
    """
    check_limit(limit, "texts")
    options: dict[str, Any] = {"strict": strict, "limit": limit, "least": 2}
    table = _table(source)
    header = table.header
    known = {name.casefold() for name in header}
    name = column or next((usual for usual in ("text", "sentence") if usual in known), "text")
    if column is None and len(header) == 1:
        name = header[0]
    index = column_of(table.source, header, name, "name the column of the texts 'text'")
    records = ((row, {"text": cells[index]}) for row, cells in table.records())
    return _gathered(records, table.source, notes=table.notes, columns=(header[index],), **options)


def read_texts(
    path: Path, columns: Sequence[str] | None, count: int, preferred: Sequence[str] = ()
) -> list[tuple[Any, ...]]:
    """Return the texts of all rows of a file, also of rows that are not examples.

    Args:
        path: as for `read_corpus`.
        columns: the columns of the texts in a table.
        count: the texts of a row.
        preferred: the columns to take when `columns` is None, if the table has them; otherwise the usual ones.

    Raises:
        DataError: as `read_corpus`; or a row has another number of texts.
    """
    table = _table(path)
    if columns is None and preferred and {*preferred} <= {*table.header}:
        columns = preferred
    places = _text_places(table, columns, "--columns")
    if len(places) != count:
        expected, given = ("pairs of texts", "one") if count == 2 else ("one text a row", "two")
        raise DataError(
            f"{path}: the predictor takes {expected}, but the file has {given}; name the columns with --columns"
        )
    return [tuple(cells[place] for place in places.values()) for _, cells in table.records()]


def read_table(
    source: str | os.PathLike[str] | Any,
    *,
    text: Sequence[str] | None = None,
    label: str | Sequence[str] | None = None,
    missing: Sequence[str] = (),
    name: str | None = None,
    strict: bool = False,
) -> Texts:
    """Read labelled texts, or pairs of texts, from columns whose names may be in any case.

    Args:
        source: a table, see `mlopt.recipes.tapweight.tables.table_of`: a file, a folder of a data set, or a `datasets.Dataset`.
        text: the column of the text, or the two columns of a pair; by default "text", "text_a" and "text_b", "sentence", or
            "sentence1" and "sentence2", the first that the file has.
        label: the column of the label, or the columns of several; by default "label" or "labels".
        missing: labels that stand for no label, such as "-1".
        name: the name of a data set in messages.
        strict: refuse a text that is empty or not Unicode, or has no label, instead of leaving its row out and reporting it.

    Returns:
        At least one example.

    Raises:
        DataError: the file cannot be used; the message names the file, the row, its content and the remedy.
        FileNotFoundError: there is no such file.

    Example:
        >>> from mlopt.recipes.tapweight.text import read_table
        >>> with open("reports.csv", "w") as file:
        ...     file.writelines(["text,urgent,solved\\n", "fire,1,0\\n", "rain,0,\\n", "sun,,\\n"])
        >>> reports = read_table("reports.csv", label=["urgent", "solved"])
        >>> reports.cells(), reports.skipped
        ([('1', '0'), ('0', None)], (Skipped(row=4, reason='the label is missing'),))
    """
    table = table_of(source, name=name)
    if label is None:
        known = {column.casefold() for column in table.header}
        label = "labels" if "labels" in known and "label" not in known else "label"
    return _read(table, text, label, missing, strict)


def from_dataset(
    dataset: Any,
    *,
    text: Sequence[str] | None = None,
    label: str | Sequence[str] | None = "label",
    name: str = "the data set",
    strict: bool = False,
) -> Texts:
    """Read a `datasets.Dataset`.

    Args:
        dataset: one split. Labels of a column of classes become their names; a negative one is missing.
        text: as in `read_table`.
        label: the column of the label, or the columns of several; None for an unlabelled corpus.
        name: its name in messages.
        strict: as in `read_table`.

    Returns:
        At least one example.

    Raises:
        DataError: the data cannot be used; the message names the row, its content and the remedy.
    """
    return _read(table_of(dataset, name=name), text, label, (), strict)


def _table(source: str | os.PathLike[str] | Any) -> Table:
    """Read a table, or a file with a text a line as a table of one column."""
    known = (*SUFFIXES, *_LISTS)
    if hasattr(source, "column_names") or is_folder(source) or suffix_of(Path(source), known) not in _LISTS:
        return table_of(source)
    return list_of(Path(source), "text")


def _read(
    table: Table,
    text: Sequence[str] | None,
    label: str | Sequence[str] | None,
    missing: Sequence[str],
    strict: bool,
) -> Texts:
    """Return the texts of a table, with their labels if columns of labels are named."""
    places = _text_places(table, text, "--text")
    labels: tuple[int, ...] = ()
    if label is not None:
        labels = _label_places(table, [label] if isinstance(label, str) else label, places.values())

    def example(cells: Sequence[Any]) -> Example:
        made = {key: cells[place] for key, place in places.items()}
        own = tuple(None if is_empty(cells[place], missing) else cells[place] for place in labels)
        return {**made, "label": own if len(own) > 1 else own[0]} if own else made

    records = ((row, example(cells)) for row, cells in table.records())
    columns = tuple(table.header[place] for place in places.values())
    texts = _gathered(records, table.source, notes=table.notes, columns=columns, strict=strict)
    return attrs.evolve(texts, label_names=tuple(table.header[place] for place in labels)) if labels else texts


def _label_places(table: Table, labels: Sequence[str], texts: Collection[int]) -> tuple[int, ...]:
    """Return the index of each column of labels."""
    remedy = "name the column with --labels"
    if not labels:
        header = ", ".join(map(shown, table.header))
        raise DataError(f"{table.source}: labels={list(labels)!r} names no column; available: {header}; {remedy}")
    places = tuple(column_of(table.source, table.header, label, remedy) for label in labels)
    if len(set(places)) < len(places) or set(places) & set(texts):
        raise DataError(
            f"{table.source}: labels={list(labels)!r} must be different columns, not those of the text; correct --labels"
        )
    return places


def _text_places(table: Table, columns: Sequence[str] | None, option: str) -> dict[str, int]:
    """Return the index of each column of text, by its key in an example; `option` names the columns on the command line."""
    source, header = table.source, table.header
    remedy = f"give the column of the text, or the two columns of a pair, with {option}"
    if columns is None:
        known = {name.casefold() for name in header}
        columns = next((usual for usual in _USUAL if known >= set(usual)), None)
        if columns is None:
            raise DataError(f"{source}: no column 'text'{suggestion('text', header)}; {remedy}")
    if isinstance(columns, str) or not 1 <= len(columns) <= 2 or len(set(columns)) < len(columns):
        raise DataError(f"{source}: text={columns!r}; {remedy}")
    places = [column_of(source, header, name, f"name the columns of text with {option}") for name in columns]
    return dict(zip(("text", "text_b"), places, strict=False))


def _gathered(
    records: Iterable[tuple[int, Example]],
    source: str,
    *,
    notes: tuple[str, ...],
    columns: tuple[str, ...],
    **options: Any,
) -> Texts:
    """Check the examples; leave out those without a text, a whole one, or a label. `options` are those of `gather`."""

    def example(row: int, record: Example) -> Example:
        for key in ("text", "text_b"):
            if key in record and not isinstance(record[key], str | None):
                raise DataError(
                    f"{source}, row {row}: {shown(record[key])} is not text; give strings, or name another column with --text"
                )
        check_texts(_texts(record))
        if "label" in record and _is_missing(record["label"]):
            raise UnusableError("the label is missing")
        return record

    return Texts(**gather(records, example, source, noun="text", **options), notes=notes, columns=columns)


def _is_missing(label: Any) -> bool:
    return all(cell is None for cell in label) if isinstance(label, tuple) else label is None


def _texts(example: Example) -> list[Any]:
    return [example[key] for key in ("text", "text_b") if key in example]


def check_texts(texts: Sequence[str | None]) -> None:
    """Refuse a text that is empty or not Unicode.

    Raises:
        UnusableError: the text cannot be used.
    """
    if not all((text or "").strip() for text in texts):
        raise UnusableError("the text is empty")
    half = _SURROGATE.search("\n".join(filter(None, texts)))
    if half:
        raise UnusableError(f"the text has {half[0]!r}, half of a character")
