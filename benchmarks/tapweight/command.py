"""The commands: `molecules` and `text` run a study, `report` prints its tables, `cost` measures the methods' cost."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from .options import parser, plan_of, standard_of
from .rows import read
from .study import run
from .tables import markdown

__all__ = ["main"]


def main(arguments: Sequence[str]) -> int:
    """Run the command that the first argument names; return the exit status."""
    name = arguments[0] if arguments and arguments[0] in _COMMANDS else "molecules"
    return _COMMANDS[name](arguments[1:] if arguments and arguments[0] == name else arguments)


def _study(modality: str) -> Callable[[Sequence[str]], int]:
    def command(arguments: Sequence[str]) -> int:
        own = parser(modality)
        options = own.parse_args(arguments)
        if (options.corpus is None) != (options.table is None):
            own.error("--corpus and --table go together; give both, or neither for the named tasks")
        if options.corpus is None and not options.data.is_dir():
            own.error(f"no folder {options.data}: give --data, or your own files by --corpus and --table")
        plan = plan_of(standard_of(modality), options)
        with tempfile.TemporaryDirectory() as folder:
            file = options.json or Path(folder) / "rows.jsonl"
            faults = run(plan, file, options.processes)
            rows = [row for row in read([file] if file.exists() else []) if row["key"] == plan.key]
            print(markdown(rows))
        for fault in faults:
            print(f"Not computed: {fault}")
        return 1 if faults else 0

    return command


def _report(arguments: Sequence[str]) -> int:
    own = argparse.ArgumentParser(
        prog="python -m benchmarks.tapweight report", description="Print the tables of a study."
    )
    own.add_argument("files", nargs="+", type=Path, metavar="FILE", help="rows of studies")
    own.add_argument("--figures", type=Path, metavar="FOLDER", help="draw the figures as PNG files")
    options = own.parse_args(arguments)
    rows = read(options.files)
    print(markdown(rows))
    if options.figures is not None:
        from .figures import draw

        for file in draw(rows, options.figures):
            print(file)
    return 0


def _cost(arguments: Sequence[str]) -> int:
    from .cost import main as cost

    return cost(arguments)


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "molecules": _study("molecules"),
    "text": _study("text"),
    "report": _report,
    "cost": _cost,
}
