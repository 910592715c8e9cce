"""Reads labelled files of SMILES: a molecule a line, with its name or its labels after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlopt.validation import shown

from ..files import DataError, text_of
from ..labels import number_of
from ..tables import Table
from .columns import is_smiles

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["smi_table"]

_REMEDY = "name the columns in a first line, such as 'smiles name label'"
_COMMENT = "#"


def smi_table(path: Path) -> Table:
    """Read a file of SMILES as a table: the SMILES, and the columns after it.

    One tab separates two cells, which may then be empty or hold blanks, if each line has equally many; otherwise blanks and tabs
    do. A first line with a word such as "smiles" or "canonical_smiles" names the columns, also after a "#". Without one they are
    "column 2", "column 3", ..., unless one of them may be either a label or a number in a catalogue. Other lines that begin with
    "#" are comments.

    Args:
        path: the file, also compressed.

    Raises:
        DataError: the lines have different numbers of columns, there is nothing after the SMILES, or the meaning of the first
            line or of a column is not clear; the message names the file, the row and the remedy.
    """
    content = text_of(path)
    lines = [(row, line.rstrip("\n")) for row, line in enumerate(content.lines(), start=1) if line.strip()]
    molecules = [(row, line) for row, line in lines if not line.lstrip().startswith(_COMMENT)]
    named = bool(molecules) and _has_names(molecules[0][1])
    if not named and lines and molecules and (names := _names_in_comment(lines[0][1], molecules[0][1])):
        named, molecules = True, [(lines[0][0], names), *molecules]
    if not molecules[named:]:
        raise DataError(f"{path}: no molecule; give a file with at least one example")
    rows = [row for row, _ in molecules]
    records = _cells([line for _, line in molecules], named=named)
    for row, cells in zip(rows, records, strict=True):
        if len(cells) != len(records[0]):
            raise DataError(
                f"{path}, row {row}: {len(cells)} columns, but the first line has {len(records[0])}; give a .csv, or put one tab "
                "between two cells: then names may have blanks, and cells may be empty"
            )
    if len(records[0]) == 1:
        raise DataError(f"{path}: nothing after the SMILES, and a task needs labels; add them, or give a .csv")
    header = tuple(records[0]) if named else _numbered(path, rows[0], records)
    if duplicates := sorted({name for name in header if header.count(name) > 1}):
        raise DataError(f"{path}: the header names {shown(duplicates[0])} more than once; rename the columns")
    comments = len(lines) - len(molecules)
    return Table(
        source=str(path),
        header=header,
        rows=tuple(rows[named:]),
        cells=tuple(records[named:]),
        notes=(*content.notes, *([f"lines of comments: {comments}"] if comments else [])),
    )


def _has_names(line: str) -> bool:
    """Return True if a line names the columns."""
    return any("smiles" in word.casefold() for word in line.split())


def _names_in_comment(line: str, first: str) -> str:
    """Return the names of the columns that a comment holds, as many as the first molecule has cells; empty if there are none."""
    names = line.lstrip().lstrip(_COMMENT).lstrip()
    alike = len(names.split()) == len(first.split()) or 0 < names.count("\t") == first.count("\t")
    return names if line.lstrip().startswith(_COMMENT) and _has_names(names) and alike else ""


def _cells(lines: Sequence[str], *, named: bool) -> list[list[str]]:
    """Return the cells of each line; of columns without a name, those that are not empty throughout."""
    counts = {line.count("\t") for line in lines}
    records = [[cell.strip() for cell in line.split("\t")] for line in lines]
    if len(counts) > 1 or 0 in counts or (not named and any(" " in cells[0] for cells in records)):
        return [line.split() for line in lines]
    kept = [k for k in range(len(records[0])) if named or any(cells[k] for cells in records)]
    return [[cells[k] for k in kept] for cells in records]


def _numbered(path: Path, row: int, records: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return numbers as the names of the columns of a file whose first line names none, after checking that it is a molecule."""
    first, *others = zip(*records, strict=True)
    if not is_smiles(first[0]):
        raise DataError(
            f"{path}, row {row}: {shown(first[0])} is not a SMILES; correct it, or call it 'smiles' if the line names the columns"
        )
    for number, cells in enumerate(others, start=2):
        _check_clear(path, number, [cell for cell in cells if cell])
    return ("smiles", *(f"column {number}" for number in range(2, len(others) + 2)))


def _check_clear(path: Path, number: int, cells: Sequence[str]) -> None:
    """Refuse a column of different whole numbers: they may be labels, or numbers of a catalogue."""
    numbers = [number_of(cell) for cell in cells]
    if len(set(cells)) == len(cells) > 2 and all(x is not None and x == x and float(x).is_integer() for x in numbers):
        raise DataError(
            f"{path}: column {number} holds different whole numbers, which may be labels or numbers of a catalogue; {_REMEDY}"
        )
