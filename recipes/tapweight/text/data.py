"""Reading text: files of documents, labelled tables and data sets; every row left out is accounted for."""

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

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from .batches import Example

__all__ = ["Texts", "from_dataset", "read_corpus", "read_table"]

_TABLES = (".csv", ".jsonl")
_LISTS = (".txt",)
_LONGEST = 2**31 - 1  # characters of a document
#: What JSON can say of a character in two parts, one of which a text that was cut off lacks; no tokenizer takes it.
_SURROGATE = re.compile("[\ud800-\udfff]")
#: The columns of text that are looked for where none are named.
_USUAL = (("text",), ("text_a", "text_b"), ("sentence",), ("sentence1", "sentence2"))


@attrs.frozen(eq=False, repr=False, kw_only=True)
class Texts(Examples["Example"]):
    """The texts of one file or data set, in its order.

    Each example has "text", for a pair of texts also "text_b", and, if there are labels, "label", as it stands there.
    """

    noun = "texts"

    def copy(self) -> Texts:
        """Return the same texts in examples of their own, to which objectives may attach targets."""
        return attrs.evolve(self, examples=tuple(dict(example) for example in self.examples))

    def unlabelled(self) -> Texts:
        """Return every text once, each of a pair on its own, without labels: a corpus for the task that it is the data of."""
        rows = {text: row for example, row in zip(self.examples, self.rows, strict=True) for text in _texts(example)}
        return Texts(examples=tuple({"text": text} for text in rows), rows=tuple(rows.values()), source=self.source)


def read_corpus(
    path: str | os.PathLike[str], *, column: str = "text", strict: bool = False, limit: int | None = None
) -> Texts:
    """Read an unlabelled corpus.

    Args:
        path: `.txt` with a document a line, blank lines apart; or `.csv` or `.jsonl` with a column of text (others are
            ignored). Each may be gzipped and end in `.gz`.
        column: the column of the texts.
        strict: refuse a text in a table that is empty or no Unicode, instead of leaving it out.
        limit: stop after so many texts; at least 2.

    Returns:
        At least two texts.

    Raises:
        DataError: naming the file, the row, what was found there and the remedy.
        FileNotFoundError: where there is no such file.
    """
    check_limit(limit, "texts")
    path = Path(path)
    records: Iterable[tuple[int, Example]]
    if suffix_of(path, _TABLES + _LISTS) in _LISTS:
        records = ((row, {"text": line.strip()}) for row, line in enumerate(lines_of(path), start=1) if line.strip())
    else:
        records = _records(path, {"text": column})
    return _gathered(records, str(path), strict=strict, limit=limit, least=2)


def read_table(
    path: str | os.PathLike[str],
    *,
    text: Sequence[str] | None = None,
    label: str = "label",
    strict: bool = False,
) -> Texts:
    """Read labelled texts, or pairs of texts, from columns whose names may be in any case.

    Args:
        path: `.csv` with a header row, or `.jsonl` with an object a line; each may be gzipped and end in `.gz`.
        text: the column of the text, or the two columns of a pair; by default "text", "text_a" and "text_b", "sentence", or
            "sentence1" and "sentence2", the first that there are.
        label: the column of the label.
        strict: refuse a text that is empty or no Unicode, instead of leaving its row out and saying so.

    Returns:
        At least one example.

    Raises:
        DataError: naming the file, the row, what was found there and the remedy.
        FileNotFoundError: where there is no such file.
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
        dataset: one split. A column of classes gives their names.
        text: as in `read_table`.
        label: the column of the label; None for an unlabelled corpus.
        name: what messages call it.
        strict: as in `read_table`.

    Returns:
        At least one example.

    Raises:
        DataError: naming the row, what was found there and the remedy.
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
                # -1 stands for no label, as in test splits whose labels are not public.
                example["label"] = names[example["label"]] if example["label"] >= 0 else None
            yield row, example

    return _gathered(records(), name, strict=strict)


def _text_columns(source: str, asked: Sequence[str] | None, header: Sequence[str]) -> dict[str, str]:
    """Return the columns of the texts, by their keys in an example."""
    if asked is None:
        known = {name.casefold() for name in header}
        asked = next((usual for usual in _USUAL if known >= set(usual)), None)
        if asked is None:
            raise DataError(f"{source}: no column 'text'{suggestion('text', header)}; name the text's, or a pair's two")
    if isinstance(asked, str) or not 1 <= len(asked) <= 2 or len(set(asked)) < len(asked):
        raise DataError(f"{source}: text={asked!r}; give the column of the text, or the two columns of a pair")
    return dict(zip(("text", "text_b"), asked, strict=False))


def _columns(path: Path) -> list[str]:
    """Return the names of a table's columns; of a JSONL file, the keys of its first object."""
    return table_of(path, _LONGEST)[0] if suffix_of(path, _TABLES) == ".csv" else list(next(_objects(path))[1])


def _records(path: Path, columns: dict[str, str]) -> Iterator[tuple[int, Example]]:
    """Yield the examples of a table with the line that each starts at."""
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
            raise DataError(f"{path}, row {row}: not valid JSON ({error}); each line is an object") from error
        if not isinstance(content, dict):
            raise DataError(f"{path}, row {row}: {line.strip()[:40]!r} is no JSON object; each line is one")
        yield row, content


def _gathered(records: Iterable[tuple[int, Example]], source: str, **options: Any) -> Texts:
    """Check the examples, and leave out those of which a text is empty or not Unicode; `options` are those of `gather`."""

    def example(row: int, record: Example) -> Example:
        for key in ("text", "text_b"):
            if key in record and not isinstance(record[key], str | None):
                raise DataError(f"{source}, row {row}: {record[key]!r} is no text; give strings")
        if fault := _fault(_texts(record)):
            raise UnusableError(fault)
        if "label" in record and _is_missing(record["label"]):
            raise DataError(f"{source}, row {row}: the label is missing; give one, or leave the row out")
        return record

    examples, rows, skipped = gather(records, example, source, noun="text", **options)
    return Texts(examples=examples, rows=rows, skipped=skipped, source=source)


def _texts(example: Example) -> list[Any]:
    return [example[key] for key in ("text", "text_b") if key in example]


def _fault(texts: Sequence[str | None]) -> str | None:
    """Return why texts are no example, or None where they are one."""
    if not all((text or "").strip() for text in texts):
        return "the text is empty"
    half = _SURROGATE.search("\n".join(filter(None, texts)))
    return f"the text has {half[0]!r}, half of a character" if half else None


def _is_missing(label: Any) -> bool:
    return (
        label is None
        or (isinstance(label, str) and not label.strip())
        or (isinstance(label, float) and math.isnan(label))
    )
