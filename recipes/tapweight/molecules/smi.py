"""Read files of SMILES: a molecule a line, with its name or its labels after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlopt.validation import shown

from ..files import DataError, text_of
from ..tables import Table
from .columns import is_smiles

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["smi_list", "smi_table"]

_COMMENT = "#"


def smi_table(path: Path) -> Table:
    """Read a file of SMILES as a table: the SMILES, and the columns after it.

    One tab separates two cells, which may then be empty or hold blanks, if each line has equally many; otherwise blanks and tabs
    do. A first line with a word such as "smiles" or "canonical_smiles" names the columns, also after a "#". Without one they are
    "column 2", "column 3", ... Other lines that begin with "#" are comments.

    Args:
        path: the file, also compressed.

    Raises:
        DataError: the lines have different numbers of columns, there is nothing after the SMILES, or the meaning of the first
            line is not clear; the message names the file, the row and the remedy.
    """
    lines, notes, named = _lines(path)
    rows = [row for row, _ in lines]
    records = _cells([line for _, line in lines], named=named)
    for row, cells in zip(rows, records, strict=True):
        if len(cells) != len(records[0]):
            raise DataError(
                f"{path}, row {row}: {len(cells)} columns, but the first line has {len(records[0])}; give a .csv, or put one tab "
                "between two cells: then names may contain spaces, and cells may be empty"
            )
    if len(records[0]) == 1:
        raise DataError(f"{path}: the lines hold only SMILES, but a task needs labels; add them, or give a .csv")
    header = tuple(records[0]) if named else _numbered(path, rows[0], records)
    if duplicates := sorted({name for name in header if header.count(name) > 1}):
        raise DataError(f"{path}: the header names {shown(duplicates[0])} more than once; rename the columns")
    return Table(
        source=str(path),
        header=header,
        rows=tuple(rows[named:]),
        cells=tuple(records[named:]),
        notes=notes,
        named=named,
    )


def smi_list(path: Path) -> Table:
    """Read a file of SMILES as a table of one column "smiles": the first word of each line, or the column that has this name.

    A first line with the names of the columns, and comments, are as in `smi_table`. Lines may have different numbers of words.

    Args:
        path: the file, also compressed.

    Raises:
        DataError: there is no molecule.
    """
    lines, notes, named = _lines(path)
    separator = "\t" if named and "\t" in lines[0][1] else None
    names = [name.strip() for name in lines[0][1].casefold().split(separator)] if named else []
    place = next((k for k, name in enumerate(names) if "smiles" in name), 0)
    cells = [[cell.strip() for cell in line.split(separator)] for _, line in lines[named:]]
    return Table(
        source=str(path),
        header=("smiles",),
        rows=tuple(row for row, _ in lines[named:]),
        cells=tuple((own[place] if place < len(own) else "",) for own in cells),
        notes=(*notes, *(["the first line names the columns"] if named else [])),
    )


def _lines(path: Path) -> tuple[list[tuple[int, str]], tuple[str, ...], bool]:
    """Return the lines with their rows, comments apart; notes; and whether the first one names the columns."""
    content = text_of(path)
    lines = [(row, line.rstrip("\n")) for row, line in enumerate(content.lines(), start=1) if line.strip()]
    molecules = [(row, line) for row, line in lines if not line.lstrip().startswith(_COMMENT)]
    named = bool(molecules) and _has_names(molecules[0][1])
    if not named and lines and molecules and (names := _names_in_comment(lines[0][1], molecules[0][1])):
        named, molecules = True, [(lines[0][0], names), *molecules]
    if not molecules[named:]:
        raise DataError(f"{path}: the file holds no molecule; give a file with at least one")
    comments = len(lines) - len(molecules)
    return molecules, (*content.notes, *([f"lines of comments: {comments}"] if comments else [])), named


def _has_names(line: str) -> bool:
    """Return True if a line names the columns: a word is about SMILES, and the first is not one unless a word is just that."""
    words = line.casefold().split()
    return "smiles" in words or (any("smiles" in word for word in words) and not is_smiles(line.split()[0]))


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
    return ("smiles", *(f"column {number}" for number in range(2, len(others) + 2)))
