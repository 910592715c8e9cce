"""Write the history to a file during the run: CSV and JSON lines."""

from __future__ import annotations

import csv
import json
import os
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar

from ...files import named_errors, replacing
from ..history import History
from .callback import Callback

if TYPE_CHECKING:
    from ..run import Run

__all__ = ["CSVLogger", "JSONLLogger", "write_csv"]


def write_csv(history: History, file: str | os.PathLike[str]) -> None:
    """Write a history as a CSV file: a header, then a line for each row; a cell is empty if the row lacks the column.

    Floats are written with `repr`, so reading them restores every bit; NaN and infinity are written as nan, inf and -inf.

    Args:
        history: its columns are written in the order in which they were first logged.
        file: replaced atomically; its folder is created if it does not exist.

    Raises:
        OSError: the file cannot be written; the error names it.

    Example:
        >>> from mlopt.solving import write_csv
        >>> from pathlib import Path
        >>> from mlopt.testing import quadratic
        >>> problem = quadratic("two", mlopt.Identity()).problem
        >>> write_csv(mlopt.solve(problem, steps=10).history, "history.csv")
        >>> Path("history.csv").read_text().splitlines()[0]
        'step,y/loss,x/loss'
    """
    with replacing(Path(file)) as staged, open(staged, "w", encoding="utf-8", newline="") as stream:
        if history.names:
            csv.writer(stream, lineterminator="\n").writerow(history.names)
        _write_rows(stream, history, history.names)


class _FileLogger(Callback):
    """Appends rows to a file, which is rewritten from the history when a run starts or resumes."""

    in_every_process: ClassVar[bool] = False
    reads_gradients: ClassVar[bool] = False

    def __init__(self, file: str | os.PathLike[str]) -> None:
        self.file = Path(file)
        self._written = 0

    def on_train_begin(self, run: Run) -> None:
        # Before a resume, the file may contain rows from after the checkpoint, or a part of one.
        self._rewrite(run.history)
        self._written = len(run.history)

    def on_log(self, run: Run, rows: Sequence[Mapping[str, float]]) -> None:
        self._update(run.history)

    def on_train_end(self, run: Run) -> None:
        # An error may end the run between two logs.
        self._update(run.history)

    def _update(self, history: History) -> None:
        rows = [history[i] for i in range(self._written, len(history))]
        if rows:
            self._append(rows, history)
            self._written = len(history)

    @abstractmethod
    def _rewrite(self, history: History) -> None: ...

    def _append(self, rows: list[dict[str, float]], history: History) -> None:
        with named_errors(self.file), open(self.file, "a", encoding="utf-8", newline="") as stream:
            self._write(stream, rows)

    @abstractmethod
    def _write(self, stream: IO[str], rows: Iterable[Mapping[str, float]]) -> None: ...


class CSVLogger(_FileLogger):
    """Writes the history to a CSV file during the run, see `write_csv`.

    If a column first appears after the first row, the file is rewritten with a longer header. A resumed run first rewrites the
    file from its history; in the end the file is byte for byte that of an uninterrupted run.

    Args:
        file: an existing file is replaced when the run starts.

    Raises:
        OSError: the file cannot be written; the error names it.

    Example:
        >>> from pathlib import Path
        >>> from mlopt.testing import quadratic
        >>> problem = quadratic("two", mlopt.Identity()).problem
        >>> solution = mlopt.solve(problem, steps=10, callbacks=[mlopt.CSVLogger("history.csv")])
        >>> len(Path("history.csv").read_text().splitlines())
        11
    """

    _names: tuple[str, ...] = ()

    def _rewrite(self, history: History) -> None:
        self._names = history.names
        write_csv(history, self.file)

    def _append(self, rows: list[dict[str, float]], history: History) -> None:
        if not set(self._names).issuperset(key for row in rows for key in row):
            self._rewrite(history)
        else:
            super()._append(rows, history)

    def _write(self, stream: IO[str], rows: Iterable[Mapping[str, float]]) -> None:
        _write_rows(stream, rows, self._names)


class JSONLLogger(_FileLogger):
    """Writes the history to a file during the run, one JSON object on each line.

    Numbers that are not finite are written as NaN, Infinity and -Infinity, as Python's `json` does: null would lose the kind of
    number, and strings would give a column two types. Strict JSON has no such words; readers that refuse them can read the CSV
    file. A resumed run treats the file as `CSVLogger` does.

    Args:
        file: an existing file is replaced when the run starts.

    Raises:
        OSError: the file cannot be written; the error names it.

    Example:
        >>> import json
        >>> from pathlib import Path
        >>> from mlopt.testing import quadratic
        >>> problem = quadratic("two", mlopt.Identity()).problem
        >>> solution = mlopt.solve(problem, steps=10, callbacks=[mlopt.JSONLLogger("history.jsonl")])
        >>> [json.loads(line) for line in Path("history.jsonl").read_text().splitlines()] == list(solution.history)
        True
    """

    def _rewrite(self, history: History) -> None:
        with replacing(self.file) as staged, open(staged, "w", encoding="utf-8", newline="") as stream:
            self._write(stream, history)

    def _write(self, stream: IO[str], rows: Iterable[Mapping[str, float]]) -> None:
        stream.writelines(map(_json_line, rows))


def _write_rows(stream: IO[str], rows: Iterable[Mapping[str, Any]], names: Sequence[str]) -> None:
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writerows({key: _plain(value) for key, value in row.items()} for row in rows)


def _json_line(row: Mapping[str, Any]) -> str:
    return json.dumps({key: _plain(value) for key, value in row.items()}, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """Return a Python number: numpy's numbers have a `repr` of their own."""
    return value.item() if hasattr(value, "item") else value
