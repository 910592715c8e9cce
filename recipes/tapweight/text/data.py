"""Read text from files of documents, labelled tables and data sets; report every row that is left out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from ..examples import Examples, UnusableError, check_limit, gather
from ..files import DataError, column_of, lines_of, suffix_of, table_of
from ..names import suggestion
from .sentences import split_sentences

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from .batches import Example

__all__ = ["Sentences", "Texts", "from_dataset", "read_corpus", "read_table"]

_TABLES = (".csv", ".jsonl")
_LISTS = (".txt",)
_LONGEST = 2**31 - 1  # characters of a document
#: JSON can write a character in two parts; a truncated text may hold one of them, which no tokenizer accepts.
_SURROGATE = re.compile("[\ud800-\udfff]")
#: The columns of text to look for if none are named.
_USUAL = (("text",), ("text_a", "text_b"), ("sentence",), ("sentence1", "sentence2"))


@attrs.frozen(eq=False, repr=False, kw_only=True)
class Texts(Examples["Example"]):
    """The texts of one file or data set, in its order.

    Each example has "text", for a pair of texts also "text_b", and, if there are labels, "label", as the file has it.
    """

    noun = "texts"

    def copy(self) -> Texts:
        """Return the same texts in examples of their own, to which objectives may attach targets."""
        return attrs.evolve(self, examples=tuple(dict(example) for example in self.examples))

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
    path: str | os.PathLike[str], *, column: str = "text", strict: bool = False, limit: int | None = None
) -> Texts:
    """Read an unlabelled corpus.

    Args:
        path: `.txt` with a document a line (blank lines are skipped), or `.csv` or `.jsonl` with a column of text (others are
            ignored). Each may be gzipped and end in `.gz`.
        column: the column of the texts.
        strict: refuse a text of a table that is empty or not Unicode, instead of leaving it out.
        limit: stop after so many texts; at least 2.

    Returns:
        At least two texts.

    Raises:
        DataError: the file cannot be used; the message names the file, the row, its content and the remedy.
        FileNotFoundError: there is no such file.
    """
    check_limit(limit, "texts")
    path = Path(path)
    return _gathered(_unlabelled(path, {"text": column}), str(path), strict=strict, limit=limit, least=2)


def read_texts(path: Path, columns: Sequence[str] | None, count: int) -> Iterator[tuple[Any, ...]]:
    """Yield the texts of all rows of a file, also of rows that are not examples.

    Args:
        path: as for `read_corpus`.
        columns: the columns of the texts in a table; the usual ones when None.
        count: the texts of a row.

    Raises:
        DataError: as `read_corpus`; or a row has another number of texts.
    """
    listed = suffix_of(path, _TABLES + _LISTS) in _LISTS
    named = {"text": "text"} if listed else _text_columns(str(path), columns, _columns(path))
    if len(named) != count:
        expected, given = ("pairs of texts", "one") if count == 2 else ("one text a row", "two")
        raise DataError(f"{path}: the predictor takes {expected}, and the file has {given}; name the columns")
    return (tuple(record.values()) for _, record in _unlabelled(path, named))


def _unlabelled(path: Path, columns: dict[str, str]) -> Iterator[tuple[int, Example]]:
    """Yield the texts of all rows of a file, each with its 1-based line."""
    if suffix_of(path, _TABLES + _LISTS) in _LISTS:
        return ((row, {"text": line.strip()}) for row, line in enumerate(lines_of(path), start=1) if line.strip())
    return _records(path, columns)


def read_table(
    path: str | os.PathLike[str], *, text: Sequence[str] | None = None, label: str = "label", strict: bool = False
) -> Texts:
    """Read labelled texts, or pairs of texts, from columns whose names may be in any case.

    Args:
        path: `.csv` with a header row, or `.jsonl` with an object a line; each may be gzipped and end in `.gz`.
        text: the column of the text, or the two columns of a pair; by default "text", "text_a" and "text_b", "sentence", or
            "sentence1" and "sentence2", the first that the file has.
        label: the column of the label.
        strict: refuse a text that is empty or not Unicode, instead of leaving its row out and reporting it.

    Returns:
        At least one example.

    Raises:
        DataError: the file cannot be used; the message names the file, the row, its content and the remedy.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    suffix_of(path, _TABLES)
    columns = {**_text_columns(str(path), text, _columns(path)), "label": label}
    return _gathered(_records(path, columns), str(path), strict=strict)


def from_dataset(
    dataset: Any,
    *,
    text: Sequence[str] | None = None,
    label: str | None = "label",
    name: str = "the data set",
    strict: bool = False,
) -> Texts:
    """Read a `datasets.Dataset`.

    Args:
        dataset: one split. Labels of a column of classes become their names.
        text: as in `read_table`.
        label: the column of the label; None for an unlabelled corpus.
        name: its name in messages.
        strict: as in `read_table`.

    Returns:
        At least one example.

    Raises:
        DataError: the data cannot be used; the message names the row, its content and the remedy.
    """
    header = list(dataset.column_names)
    columns = _text_columns(name, text, header)
    if label is not None:
        columns["label"] = label
    columns = {key: header[column_of(name, header, column)] for key, column in columns.items()}
    names = getattr(dataset.features.get(columns.get("label")), "names", None)

    def records() -> Iterator[tuple[int, Example]]:
        for row, record in enumerate(dataset):
            example = {key: record[column] for key, column in columns.items()}
            if names is not None and example["label"] is not None:
                # -1 means that there is no label, as in test splits whose labels are not public.
                example["label"] = names[example["label"]] if example["label"] >= 0 else None
            yield row, example

    return _gathered(records(), name, strict=strict)


def _text_columns(source: str, columns: Sequence[str] | None, header: Sequence[str]) -> dict[str, str]:
    """Return the columns of the texts, by their keys in an example."""
    remedy = "give the column of the text, or the two columns of a pair"
    if columns is None:
        known = {name.casefold() for name in header}
        columns = next((usual for usual in _USUAL if known >= set(usual)), None)
        if columns is None:
            raise DataError(f"{source}: no column 'text'{suggestion('text', header)}; {remedy}")
    if isinstance(columns, str) or not 1 <= len(columns) <= 2 or len(set(columns)) < len(columns):
        raise DataError(f"{source}: text={columns!r}; {remedy}")
    return dict(zip(("text", "text_b"), columns, strict=False))


def _columns(path: Path) -> list[str]:
    """Return the names of a table's columns; of a JSONL file, the keys of its first object."""
    return table_of(path, _LONGEST)[0] if suffix_of(path, _TABLES) == ".csv" else list(next(_objects(path))[1])


def _records(path: Path, columns: dict[str, str]) -> Iterator[tuple[int, Example]]:
    """Yield the examples of a table, each with its first line."""
    if suffix_of(path, _TABLES) == ".csv":
        header, rows = table_of(path, _LONGEST)
        indices = {key: column_of(path, header, name) for key, name in columns.items()}
        return ((row, {key: cells[index] for key, index in indices.items()}) for row, cells in rows)
    return ((row, _picked(path, row, content, columns)) for row, content in _objects(path))


def _picked(path: Path, row: int, content: dict[str, Any], columns: dict[str, str]) -> Example:
    header, cells = list(content), list(content.values())
    return {key: cells[column_of(f"{path}, row {row}", header, name)] for key, name in columns.items()}


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a JSONL file with their lines; skip blank lines."""
    for row, line in enumerate(lines_of(path), start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, row {row}: not valid JSON ({error}); write an object on each line") from error
        if not isinstance(content, dict):
            raise DataError(f"{path}, row {row}: {line.strip()[:40]!r} is not a JSON object; write one on each line")
        yield row, content


def _gathered(records: Iterable[tuple[int, Example]], source: str, **options: Any) -> Texts:
    """Check the examples; leave out those with a text that is empty or not Unicode. `options` are those of `gather`."""

    def example(row: int, record: Example) -> Example:
        for key in ("text", "text_b"):
            if key in record and not isinstance(record[key], str | None):
                raise DataError(f"{source}, row {row}: {record[key]!r} is not text; give strings")
        check_texts(_texts(record))
        if "label" in record and _is_missing(record["label"]):
            raise DataError(f"{source}, row {row}: the label is missing; give one, or leave the row out")
        return record

    return Texts(**gather(records, example, source, noun="text", **options))


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


def _is_missing(label: Any) -> bool:
    return (
        label is None
        or (isinstance(label, str) and not label.strip())
        or (isinstance(label, float) and math.isnan(label))
    )
