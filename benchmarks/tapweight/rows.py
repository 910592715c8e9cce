"""The rows of a study in a file of JSON lines, each appended when it is computed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs

from mlopt.recipes.tapweight.files import DataError

from .plan import Cell

__all__ = ["Row", "Rows", "read"]

Row = dict[str, Any]
#: Entries that rows of earlier versions lack.
_LATER: Row = {"weight_errors": None}


def read(files: Iterable[Path]) -> list[Row]:
    """Return the rows of several files; of a row that is there twice, the last.

    A last line without its end was cut off when the study was stopped, and is left out.

    Raises:
        DataError: another line is not a row.
    """
    rows: dict[tuple[str, Cell], Row] = {}
    for file in files:
        whole = file.read_text(encoding="utf-8").rpartition("\n")[0]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                row = json.loads(line)
                rows[row["key"], _cell(row)] = _LATER | row
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(f"{file}, line {number}: not a row of a study ({error}); remove the line") from error
    return list(rows.values())


def _cell(row: Row) -> Cell:
    return Cell(**{field.name: row[field.name] for field in attrs.fields(Cell)})


@attrs.frozen
class Rows:
    """The rows of one file and one key, which several processes may append to.

    Args:
        file: the file; it need not exist.
        key: the key of the plan.
    """

    file: Path
    key: str

    def present(self) -> set[Cell]:
        """Return the cells whose rows the file holds."""
        return {_cell(row) for row in read([self.file] if self.file.exists() else []) if row["key"] == self.key}

    def start(self) -> None:
        """Make the folder of the file, and cut off a last line without its end."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if self.file.exists():
            content = self.file.read_bytes()
            self.file.write_bytes(content[: content.rfind(b"\n") + 1])

    def append(self, cell: Cell, **measured: Any) -> Row:
        """Write a row, as one write to the end of the file, so that rows of several processes do not mix; return it."""
        row = {"key": self.key, **attrs.asdict(cell), **measured}
        descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, (json.dumps(row) + "\n").encode())
        finally:
            os.close(descriptor)
        return row
