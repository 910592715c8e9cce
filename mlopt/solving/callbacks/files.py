"""The history in a file that grows with the run: CSV and JSON lines."""

from __future__ import annotations

import csv
import json
import os
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ...files import named_errors, replacing
from ..history import History
from .callback import Callback

if TYPE_CHECKING:
    from ..run import Run

__all__ = ["CSVLogger", "JSONLLogger", "write_csv"]


def write_csv(history: History, file: str | os.PathLike[str]) -> None:
    """Write a history as a CSV file: a header, then a line for each row, empty where a row has no such value.

    Floats are written as `repr` does, so that reading them gives the same bits; NaN and infinity as nan, inf, -inf.

    Args:
        history: its columns come in the order of their first appearance.
        file: replaced as a whole, or not at all; its folder is made where it does not exist.

    Raises:
        OSError: the file cannot be written; the error names it.

    Example:
        >>> write_csv(solution.history, "history.csv")
    """
    with replacing(Path(file)) as staged, open(staged, "w", encoding="utf-8", newline="") as stream:
        if history.names:
            csv.writer(stream, lineterminator="\n").writerow(history.names)
        _write_rows(stream, history, history.names)


class _FileLogger(Callback):
    """Rows go to the end of the file; a run that begins, or is resumed, starts from the file of the history it has."""

    def __init__(self, file: str | os.PathLike[str]) -> None:
        self.file = Path(file)
        self._written = 0

    def on_train_begin(self, run: Run) -> None:
        # After a resume the file may hold rows of steps that were taken after the checkpoint, or half of one.
        self._rewrite(run.history)
        self._written = len(run.history)

    def on_log(self, run: Run, rows: Sequence[Mapping[str, float]]) -> None:
        self._update(run.history)

    def on_train_end(self, run: Run) -> None:
        # An error may have ended the run between two logs.
        self._update(run.history)

    def _update(self, history: History) -> None:
        rows = [history[i] for i in range(self._written, len(history))]
        if rows:
            self._append(rows, history)
            self._written = len(history)

    @abstractmethod
    def _rewrite(self, history: History) -> None: ...

    @abstractmethod
    def _append(self, rows: list[dict[str, float]], history: History) -> None: ...


class CSVLogger(_FileLogger):
    """Writes the history to a CSV file while it grows, see `write_csv`.

    Where a column appears later than the first row, the file is written anew with the longer header. A resumed run begins
    by writing the file anew from its history; at the end it is, byte for byte, the file of an uninterrupted run.

    Args:
        file: an existing one is replaced when the run begins.

    Raises:
        OSError: the file cannot be written; the error names it.

    Example:
        >>> mlopt.solve(problem, steps=1_000, callbacks=[mlopt.CSVLogger("history.csv")])
    """

    _names: tuple[str, ...] = ()

    def _rewrite(self, history: History) -> None:
        self._names = history.names
        write_csv(history, self.file)

    def _append(self, rows: list[dict[str, float]], history: History) -> None:
        if not set(self._names).issuperset(key for row in rows for key in row):
            self._rewrite(history)
            return
        with named_errors(self.file), open(self.file, "a", encoding="utf-8", newline="") as stream:
            _write_rows(stream, rows, self._names)


class JSONLLogger(_FileLogger):
    """Writes the history to a file while it grows, a JSON object on each line.

    Numbers that are not finite are the bare words NaN, Infinity and -Infinity, as Python's `json` writes and reads them:
    null would lose which one it was, and text would give a column two types. Strict JSON has no such words; a reader that
    refuses them can take the CSV file. Resumed runs are treated as in `CSVLogger`.

    Args:
        file: an existing one is replaced when the run begins.

    Raises:
        OSError: the file cannot be written; the error names it.

    Example:
        >>> mlopt.solve(problem, steps=1_000, callbacks=[mlopt.JSONLLogger("history.jsonl")])
        >>> rows = [json.loads(line) for line in open("history.jsonl")]
    """

    def _rewrite(self, history: History) -> None:
        with replacing(self.file) as staged, open(staged, "w", encoding="utf-8", newline="") as stream:
            stream.writelines(map(_json_line, history))

    def _append(self, rows: list[dict[str, float]], history: History) -> None:
        with named_errors(self.file), open(self.file, "a", encoding="utf-8", newline="") as stream:
            stream.writelines(map(_json_line, rows))


def _write_rows(stream: IO[str], rows: Iterable[Mapping[str, Any]], names: Sequence[str]) -> None:
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writerows({key: _plain(value) for key, value in row.items()} for row in rows)


def _json_line(row: Mapping[str, Any]) -> str:
    return json.dumps({key: _plain(value) for key, value in row.items()}, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """Return Python's number: numpy's print themselves with the digits of their own precision."""
    return value.item() if hasattr(value, "item") else value
