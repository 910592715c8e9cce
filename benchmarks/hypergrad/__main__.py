"""Hypergradients of mlopt and of the other libraries: error, time, operations and memory, in one run.

Each library runs in its own environment and process, with one thread; `make peers` creates the environments. hypertorch and
the head of Betty exist only as repositories: name a Python that can import them with --peer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from ..report import write
from .adapters import LIBRARIES
from .bar import bar
from .figures import draw
from .repeats import repeat, runs_of
from .sections import accuracy, identity, ladder, loop, multilevel, unroll
from .table import console, show_bar, show_libraries, show_repeats, show_rows
from .workers import Part, Workplace

SECTIONS: dict[str, Callable[[Workplace], list[dict[str, Any]]]] = {
    "accuracy": accuracy.run,
    "loop": loop.run,
    "identity": identity.run,
    "unroll": unroll.run,
    "ladder": ladder.run,
    "multilevel": multilevel.run,
}


def _peer(text: str) -> tuple[str, str]:
    name, _, python = text.partition("=")
    if name not in LIBRARIES or not python:
        raise argparse.ArgumentTypeError(f"{text!r}: pass NAME=PYTHON, NAME one of {', '.join(LIBRARIES)}")
    return name, python


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hypergrad", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="fewer cases, rounds and steps: minutes")
    parser.add_argument("--json", metavar="FILE", help="write the rows, with commit and versions")
    parser.add_argument("--figures", metavar="FOLDER", type=Path, help="draw PNG files")
    parser.add_argument(
        "--peer", metavar="NAME=PYTHON", type=_peer, action="append", default=[], help="a library's Python"
    )
    parser.add_argument(
        "--repeat-near-bar",
        action="store_true",
        help="run targets within 5%% of their limit three times: some minutes more",
    )
    parser.add_argument(
        "--only", choices=SECTIONS, action="append", help="a section to run; repeat the option for several"
    )
    return parser


def _libraries(place: Workplace) -> list[dict[str, Any]]:
    """Show the libraries; return a row for each that takes part, and one for each absent library with the reason."""
    versions = {library.name: library.about["version"] for library in place.libraries}
    show_libraries(versions, place.absent)
    present = [{"section": "libraries", "library": name, "version": version} for name, version in versions.items()]
    absent = [{"section": "libraries", "library": name, "note": f"absent: {why}"} for name, why in place.absent.items()]
    return present + absent


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the sections, print their tables and the targets."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)

    def workplace(parts: Collection[Part] | None = None) -> Workplace:
        return Workplace(dict(options.peer), options.device, options.quick, parts)

    rows: list[dict[str, Any]] = []
    try:
        for name in options.only or SECTIONS:
            begin = time.monotonic()
            # New processes, because a process keeps the memory of its largest case.
            with workplace() as place:
                if not rows:
                    rows += _libraries(place)
                section_rows = [{"section": name, **row} for row in SECTIONS[name](place)]
            spent = time.monotonic() - begin
            rows += [*section_rows, {"section": "duration", "of": name, "seconds": spent}]
            show_rows(name, section_rows)
            console.print(f"{name}: {spent:.0f} s\n")
        if options.repeat_near_bar:
            rows += repeat(rows, SECTIONS, workplace)
    finally:
        write(options.json, options.device, rows)
    show_bar(bar(rows))
    show_repeats(runs_of(rows))
    if options.figures is not None:
        for file in draw(rows, options.figures):
            console.print(str(file))


if __name__ == "__main__":
    main()
