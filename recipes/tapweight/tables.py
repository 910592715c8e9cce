"""One reader of tables for every modality: delimited text, JSON, Parquet, and data sets of `datasets`."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from mlopt.imports import import_optional
from mlopt.validation import shown

from .files import DataError, suffix_of, text_of, unpacked
from .names import suggestion

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["SUFFIXES", "Table", "column_of", "is_folder", "list_of", "parts_of", "table_of"]

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
#: Names of the separators of cells. The first is usual in .csv; a tab, in .tsv.
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
#: Characters and records by which a separator is chosen.
_SAMPLE, _SAMPLED_RECORDS = 2**16, 50
#: Characters of the longest cell: a longer one has an open quote.
_LONGEST = 2**31 - 1
_THOUSANDS = re.compile(r"\s*[+-]?[1-9]\d{0,2}(,\d{3})+\s*")
_DECIMAL_COMMA = re.compile(r"\s*[+-]?\d*(,\d+)?([eE][+-]?\d+)?\s*")


@attrs.frozen(eq=False, kw_only=True)
class Table:
    """A table.

    Args:
        source: the file or the data set.
        header: the names of the columns.
        rows: the place of each record: 1-based line of a file of text, the header counted; 1-based number of the record in other
            files; 0-based in a data set.
        cells: the cells of each record: text, or values of JSON, Parquet and data sets.
        notes: clauses that a user should read on how the file was read.
        named: False if the file does not name its columns.
    """

    source: str
    header: tuple[str, ...]
    rows: tuple[int, ...]
    cells: tuple[Sequence[Any], ...]
    notes: tuple[str, ...] = ()
    named: bool = True

    def records(self) -> Iterator[tuple[int, Sequence[Any]]]:
        """Return the place and the cells of each record."""
        return zip(self.rows, self.cells, strict=True)

    def column(self, index: int) -> list[tuple[int, Any]]:
        """Return the place and the cell of each record, of one column."""
        return [(row, cells[index]) for row, cells in self.records()]


def column_of(source: Path | str, header: Sequence[str], name: str, remedy: str) -> int:
    """Return the index of the column of this exact name, else of this name in any case.

    Args:
        source: the file, for the error.
        header: the names of the columns.
        name: the name of the column.
        remedy: the remedy that the error names.
    """
    if name in header:
        return header.index(name)
    alike = [index for index, other in enumerate(header) if other.casefold() == name.casefold()]
    if len(alike) != 1:
        raise DataError(f"{source}: no column {name!r}{suggestion(name, header)}; {remedy}")
    return alike[0]


def table_of(source: str | os.PathLike[str] | Any, *, name: str | None = None, longest: int = _LONGEST) -> Table:
    """Read a table.

    Args:
        source: a file: .csv or .tsv with a header (commas, semicolons, tabs or bars between the cells), .jsonl with an object a
            line, .json with a list of objects or an object of columns, or .parquet; also compressed (.gz, .xz, .bz2, .zip). Or a
            folder written by `datasets.Dataset.save_to_disk`, or a `datasets.Dataset`.
        name: the name of a data set in messages.
        longest: the most characters of a cell.

    Raises:
        DataError: the table cannot be read; the message names the file, the row and the remedy.
        FileNotFoundError: there is no such file.
    """
    if hasattr(source, "column_names"):
        return _dataset(source, name or "the data set")
    path = Path(source)
    if is_folder(path):
        return _folder(path)
    suffix = suffix_of(path, SUFFIXES)
    if suffix == ".parquet":
        return _parquet(path)
    return _objects(path, suffix) if suffix in (".jsonl", ".json") else _delimited(path, suffix, longest)


def list_of(path: Path, column: str) -> Table:
    """Read a file with an entry a line as a table of one column; blank lines are skipped.

    Args:
        path: the file, also compressed.
        column: the name of the column.

    Raises:
        DataError: the file cannot be read; the message names the file, the row and the remedy.
        FileNotFoundError: there is no such file.
    """
    content = text_of(path)
    lines = [(row, line) for row, line in enumerate(content.lines(), start=1) if line.strip()]
    return Table(
        source=str(path),
        header=(column,),
        rows=tuple(row for row, _ in lines),
        cells=tuple((line.strip(),) for _, line in lines),
        notes=content.notes,
    )


def is_folder(source: str | os.PathLike[str]) -> bool:
    """Return True if a path is that of a folder, False also for a path that no file system accepts."""
    return os.path.isdir(source)


def _delimited(path: Path, suffix: str, longest: int) -> Table:
    """Read a file whose cells have a separator between them."""
    content = text_of(path)
    usual = "\t" if suffix == ".tsv" else ","
    text, stated = _without_statement(content.text)
    separator = stated or _separator(text, usual)
    notes = list(content.notes)
    if separator != usual:
        notes.append(f"the cells are separated by {_SEPARATORS[separator]}")
    if separator == "\t":
        rows, verbatim = _records_of_tabs(path, text, longest)
    else:
        rows, verbatim = list(_records(path, text, separator, longest)), False
    if verbatim:
        notes.append("quotes are part of the text")
    (_, header), *records = rows
    header = [name.strip() for name in header]
    if not records and any(header):
        raise DataError(f"{path}: there is no row below the header; give a file with at least one example")
    # Spreadsheets write separators after the last column.
    kept = [k for k, name in enumerate(header) if name or any(cells[k].strip() for _, cells in records)]
    if duplicates := sorted({header[k] for k in kept if header.count(header[k]) > 1}):
        raise DataError(f"{path}: the header names {shown(duplicates[0])} more than once; rename the columns")
    if not kept:
        raise DataError(f"{path}: the header names no column; give a file whose first row names the columns")
    cells = [[cells[k] for k in kept] for _, cells in records]
    if changed := _with_points(cells, len(kept)):
        notes.append(f"decimal commas in {', '.join(shown(header[kept[k]]) for k in changed)}")
    return Table(
        source=str(path),
        header=tuple(header[k] for k in kept),
        rows=tuple(row for row, _ in records),
        cells=tuple(cells),
        notes=tuple(notes),
    )


def _without_statement(text: str) -> tuple[str, str]:
    """Return a text with its first line blank if it is "sep=;", as Excel writes it, and the separator that it states."""
    statement = re.match(r"sep=([,;\t|])(?=\r?\n)", text)
    return (text[statement.end() :], statement[1]) if statement else (text, "")


def _separator(text: str, usual: str) -> str:
    """Return the separator that cuts all records of a sample into equally many cells, at least two, the usual one first.

    If there is none, return the usual one if it is in the header, else the one that is in it most often.
    """
    sample = text[:_SAMPLE] if len(text) <= _SAMPLE else text[: text.rfind("\n", 0, _SAMPLE) + 1]
    separators = (usual, *(other for other in _SEPARATORS if other != usual))
    for separator in separators:
        try:
            records = [cells for cells in csv.reader(io.StringIO(sample, newline=""), delimiter=separator) if cells]
        except csv.Error:
            continue
        widths = {len(cells) for cells in records[:_SAMPLED_RECORDS]}
        if len(widths) == 1 and max(widths) > 1:
            return separator
    header = text.lstrip().splitlines()[0]
    return usual if usual in header else max(separators, key=header.count)


def _records(
    path: Path, text: str, separator: str, longest: int, quoting: Any = csv.QUOTE_MINIMAL
) -> Iterator[tuple[int, list[str]]]:
    """Yield the records of a delimited file, all of one length, each with its first line; skip blank lines."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True, quoting=quoting)
    header: list[str] = []
    while True:
        row = reader.line_num + 1
        # The limit is global to the process.
        limit = csv.field_size_limit(longest)
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}, row {row}: not valid CSV ({error}); check the quotes from there on") from error
        finally:
            csv.field_size_limit(limit)
        if not cells:
            continue
        header = header or cells
        # Spreadsheets write separators after the last column, in some rows.
        while len(cells) > len(header) and not cells[-1].strip():
            cells.pop()
        if not any(name.strip() for name in header[len(cells) :]):
            cells += [""] * (len(header) - len(cells))
        if len(cells) != len(header):
            above = ", or leave out the lines above the names of the columns" if len(header) == 1 else ""
            raise DataError(
                f"{path}, row {row}: {len(cells)} cells, but the header has {len(header)}; quote the cell that holds a "
                f"separator, or add {_SEPARATORS[separator]}{above}"
            )
        yield row, cells


def _records_of_tabs(path: Path, text: str, longest: int) -> tuple[list[tuple[int, list[str]]], bool]:
    """Return the rows of a file of tabs, and True if its quotes are part of the text, as they usually are."""

    def rows(quoting: int) -> list[tuple[int, list[str]]]:
        return list(_records(path, text, "\t", longest, quoting))

    try:
        quoted = rows(csv.QUOTE_MINIMAL)
    except DataError:
        return rows(csv.QUOTE_NONE), True
    # A quote that begins one text and a quote that ends a later text would enclose the rows between them.
    if any("\t" in cell and ("\n" in cell or "\r" in cell) for _, cells in quoted for cell in cells):
        with contextlib.suppress(DataError):
            return rows(csv.QUOTE_NONE), True
    return quoted, False


def _with_points(cells: list[list[str]], width: int) -> list[int]:
    """Replace the decimal commas of each column that holds nothing but numbers with them; return these columns."""
    changed = []
    for k in range(width):
        column = [row[k] for row in cells]
        commas = [cell for cell in column if "," in cell]
        # "1,234" in each row may be thousands.
        if all(map(_DECIMAL_COMMA.fullmatch, column)) and not all(map(_THOUSANDS.fullmatch, commas)):
            changed.append(k)
            for row in cells:
                row[k] = row[k].replace(",", ".")
    return changed


def _objects(path: Path, suffix: str) -> Table:
    """Read a file of JSON objects: one a line, a list of them, or an object of columns."""
    content = text_of(path)
    try:
        whole = json.loads(content.text)
    except (ValueError, RecursionError) as error:
        if suffix == ".json" and content.text.lstrip()[:1] == "[":
            raise DataError(f"{path}: not valid JSON ({error}); correct the file") from error
        whole = None
    if isinstance(whole, dict) and suffix == ".json":
        whole = _list_of_columns(whole)
    if isinstance(whole, list) and whole and all(isinstance(record, dict) for record in whole):
        records = list(enumerate(whole, start=1))
    else:
        records = list(_object_lines(path, content.lines()))
    header = list(dict.fromkeys(name for _, record in records for name in record))
    return Table(
        source=str(path),
        header=tuple(header),
        rows=tuple(row for row, _ in records),
        cells=tuple(_picked(record, header) for _, record in records),
        notes=content.notes,
    )


def _object_lines(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a file of JSON lines; skip blank lines."""
    for row, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, row {row}: not valid JSON ({error}); write an object on each line") from error
        if not isinstance(content, dict):
            raise DataError(f"{path}, row {row}: {line.strip()[:40]!r} is not a JSON object; write one on each line")
        yield row, content


def _list_of_columns(content: dict[str, Any]) -> Any:
    """Return the objects of a JSON file that holds one list of objects by a name, or columns (lists, or objects by row)."""
    lists = [value for value in content.values() if isinstance(value, list) and value]
    if len(lists) == 1 and all(isinstance(record, dict) for record in lists[0]):
        return lists[0]
    columns = [*content.values()]
    if columns and all(isinstance(column, dict) for column in columns):
        rows = dict.fromkeys(row for column in columns for row in column)
        return [{name: column.get(row) for name, column in content.items()} for row in rows]
    if not columns or not all(isinstance(column, list) for column in columns):
        return None
    if len({len(column) for column in columns}) > 1:
        return None
    return [dict(zip(content, values, strict=True)) for values in zip(*columns, strict=True)]


def _picked(record: dict[str, Any], header: Sequence[str]) -> list[Any]:
    """Return the values of an object by the names of the header, else by these names in any case, else None."""
    folded = {name.casefold(): value for name, value in reversed(record.items())}
    return [record[name] if name in record else folded.get(name.casefold()) for name in header]


def _parquet(path: Path) -> Table:
    """Read a file of Parquet."""
    content = unpacked(path).content
    arrow = import_optional("pyarrow", "Reading .parquet", "pyarrow")
    parquet = import_optional("pyarrow.parquet", "Reading .parquet", "pyarrow")
    try:
        table = parquet.read_table(io.BytesIO(content))
    except (OSError, ValueError, arrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is not a Parquet file ({reason}); write it again, or as .csv") from error
    return _columns(str(path), {name: table[name].to_pylist() for name in table.column_names}, first=1)


def parts_of(folder: Path) -> tuple[str, ...]:
    """Return the names of the data sets in a folder that `datasets.DatasetDict.save_to_disk` wrote; none in another folder."""
    return tuple(sorted(part.name for part in folder.iterdir() if (part / "state.json").is_file()))


def _folder(path: Path) -> Table:
    """Read a folder that `datasets` wrote."""
    if not (path / "state.json").is_file():
        parts = parts_of(path)
        remedy = f"give one of its data sets: {', '.join(parts)}" if parts else "give the path of a data file"
        raise DataError(f"{path} is a folder; {remedy}")
    datasets = import_optional("datasets", "Reading a folder of a data set", "datasets")
    return _dataset(datasets.load_from_disk(str(path)), str(path))


def _dataset(dataset: Any, name: str) -> Table:
    """Read a `datasets.Dataset`; numbers of classes become their names, negative ones, which stand for no label, None."""
    if isinstance(dataset.column_names, dict):
        raise DataError(f"{name} holds several data sets; give one of them: {', '.join(dataset.column_names)}")
    columns = {}
    for column in dataset.column_names:
        values, classes = list(dataset[column]), getattr(dataset.features[column], "names", None)
        if classes is not None:
            values = [None if value is None or value < 0 else classes[value] for value in values]
        columns[column] = values
    return _columns(name, columns, first=0)


def _columns(source: str, columns: dict[str, list[Any]], first: int) -> Table:
    """Return the table of some columns."""
    records = tuple(zip(*columns.values(), strict=True))
    return Table(source=source, header=tuple(columns), rows=tuple(range(first, first + len(records))), cells=records)
