"""Reads labelled files of SMILES: a molecule a line, with its name or its labels after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..files import DataError, text_of
from ..labels import number_of
from ..tables import Table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["smi_table"]

_REMEDY = "name the columns in a first line, such as 'smiles name label'"


def smi_table(path: Path) -> Table:
    """Read a file of SMILES as a table: the SMILES, and the columns that blanks or tabs separate after it.

    A first line whose first word ends in "smiles" names the columns. Without one they are "column 2", "column 3", ..., unless one
    of them may be either a label or a number in a catalogue.

    Args:
        path: the file, also compressed.

    Raises:
        DataError: the lines have different numbers of columns, there is nothing after the SMILES, or the meaning of a column is
            not clear; the message names the file, the row and the remedy.
    """
    content = text_of(path)
    lines = [(row, line.split()) for row, line in enumerate(content.lines(), start=1) if line.strip()]
    named = bool(lines) and lines[0][1][0].casefold().endswith("smiles")
    header = lines.pop(0)[1] if named else []
    if not lines:
        raise DataError(f"{path}: no molecule; give a file with at least one example")
    width = len(header) or len(lines[0][1])
    for row, cells in lines:
        if len(cells) != width:
            raise DataError(
                f"{path}, row {row}: {len(cells)} columns, but the first line has {width}; give a .csv, in which names may have "
                "blanks and cells may be empty"
            )
    if width == 1:
        raise DataError(f"{path}: nothing after the SMILES, and a task needs labels; add them, or give a .csv")
    if not named:
        for k in range(1, width):
            _check_clear(path, k + 1, [cells[k] for _, cells in lines])
        header = ["smiles", *(f"column {k + 1}" for k in range(1, width))]
    return Table(
        source=str(path),
        header=tuple(header),
        rows=tuple(row for row, _ in lines),
        cells=tuple(cells for _, cells in lines),
        notes=content.notes,
    )


def _check_clear(path: Path, number: int, cells: Sequence[str]) -> None:
    """Refuse a column of different whole numbers: they may be labels, or numbers of a catalogue."""
    numbers = [number_of(cell) for cell in cells]
    if len(set(cells)) == len(cells) > 2 and all(x is not None and x == x and float(x).is_integer() for x in numbers):
        raise DataError(
            f"{path}: column {number} holds different whole numbers, which may be labels or numbers of a catalogue; {_REMEDY}"
        )
