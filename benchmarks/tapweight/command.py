"""The commands: `molecules` and `text` run a study, `ablation` variants; `report` prints tables, `cost` measures the cost."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path

from mlopt.errors import ArgumentError
from mlopt.recipes.tapweight.names import chosen

from .ablation import ABLATIONS, DEVELOPMENT, FRESH, report
from .estimate import estimate
from .options import parser, plan_of, standard_of
from .plan import Plan
from .rows import Row, read
from .study import run
from .tables import markdown

__all__ = ["main"]

_MODALITIES = ("molecules", "text")


def main(arguments: Sequence[str]) -> int:
    """Run the command that the first argument names, "molecules" if it is an option; return the exit status.

    Raises:
        ArgumentError: there is no such command.
    """
    if not arguments or arguments[0].startswith("-"):
        return _COMMANDS["molecules"](arguments)
    return chosen("command", arguments[0], _COMMANDS)(arguments[1:])


def _study(modality: str) -> Callable[[Sequence[str]], int]:
    def command(arguments: Sequence[str]) -> int:
        own = parser(modality)
        options = _checked(own, arguments)
        return _run(plan_of(standard_of(modality), options), options, markdown)

    return command


def _ablation(arguments: Sequence[str]) -> int:
    named = [*takewhile(lambda text: not text.startswith("-"), arguments)][:2]
    if not named:
        raise ArgumentError(f"name an ablation first: {', '.join(ABLATIONS)}; then molecules or text, then options")
    ablation, modality = chosen("ablation", named[0], ABLATIONS), [*named, _MODALITIES[0]][1]
    own = parser(chosen("modality", modality, dict(zip(_MODALITIES, _MODALITIES, strict=True))))
    own.prog = f"python -m benchmarks.tapweight ablation {named[0]} {modality}"
    own.description = f"{ablation.question} Ten development seeds, or ten fresh ones."
    own.add_argument("--fresh", action="store_true", help="the seeds that confirm what the development seeds showed")
    options = _checked(own, arguments[len(named) :])
    options.methods = options.methods or [ablation.reference, *ablation.variants]
    options.seeds = options.seeds or [*(FRESH if options.fresh else DEVELOPMENT)]
    return _run(plan_of(standard_of(modality), options), options, partial(report, ablation=ablation))


def _checked(own: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of a study; end with a sentence if their files do not go together."""
    options = own.parse_args(arguments)
    if (options.corpus is None) != (options.table is None):
        own.error("--corpus and --table go together; give both, or neither for the named tasks")
    if options.table is not None and options.tasks:
        own.error("--tasks names tasks of the study, and --table is a task of your own; give one of them")
    for option, file in (("--corpus", options.corpus), ("--table", options.table)):
        if file is not None and not file.exists():
            own.error(f"{option}: there is no file {file}")
    if options.corpus is None and not options.data.is_dir():
        own.error(f"no folder {options.data}: give --data, or your own files with --corpus and --table")
    return options


def _run(plan: Plan, options: argparse.Namespace, printed: Callable[[Sequence[Row]], str]) -> int:
    """Compute the rows that the file lacks, and print all of them; or print the plan only."""
    with tempfile.TemporaryDirectory() as folder:
        file = options.json or Path(folder) / "rows.jsonl"
        if options.plan:
            print(estimate(plan, file))
            return 0
        if options.json is None:
            print("Without --json FILE the rows are printed and not kept: a stopped study starts again.", flush=True)
        faults = run(plan, file, options.processes)
        print(printed([row for row in read([file] if file.exists() else []) if row["key"] == plan.key]))
    for fault in faults:
        print(f"Not computed: {fault}")
    return 1 if faults else 0


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
    "ablation": _ablation,
    "report": _report,
    "cost": _cost,
}
