"""The tables, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .bar import Check

__all__ = ["show_bar", "show_libraries", "show_repeats", "show_rows"]

TITLES = {
    "error": "relative error",
    "time": "time / plain",
    "flops": "FLOPs / plain",
    "memory": "memory / plain",
    "seconds": "CPU seconds",
    "worst": "worst error",
    "bfloat16": "error, bfloat16",
    "deviation": "deviation, dropout",
}
FORMATS = {"cosine": "{:.4f}", "time": "{:.1f}", "flops": "{:.1f}", "memory": "{:.2f}", "best peer / this": "{:.2f}"}
console = Console(width=150)


def show_libraries(versions: Mapping[str, str], absent: Mapping[str, str]) -> None:
    """Print the libraries that take part, and for each absent library the reason and the remedy."""
    table = Table("library", "version")
    for name, version in versions.items():
        table.add_row(name, version)
    for name, reason in absent.items():
        table.add_row(name, f"absent: {escape(reason)}")
    console.print(table)


def show_rows(section: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows of a section, one table for each case; a row without a measurement has a note with the reason."""
    hidden = {"section", "case", "dtype", "note"}
    for case in dict.fromkeys(row["case"] for row in rows):
        chosen = [row for row in rows if row["case"] == case]
        keys = [key for key in dict.fromkeys(key for row in chosen for key in row) if key not in hidden]
        noted = any("note" in row for row in chosen)
        table = Table(*(TITLES.get(key, key) for key in keys), *["note"] * noted, title=f"{section}: {case}")
        for row in chosen:
            cells = [_cell(key, row.get(key)) for key in keys]
            table.add_row(*cells, *[escape(str(row.get("note", "")))] * noted)
        console.print(table)


def _cell(key: str, value: Any) -> str:
    if value is None or (key == "iterations" and value == 0):
        return "-"
    if not isinstance(value, float):
        return str(value)
    return FORMATS.get(key, "{:.2g}").format(value)


def show_bar(checks: Sequence[Check]) -> None:
    """Print each target, its figure, and "met" or "not met"."""
    table = Table("target", "figure", "", title="Targets")
    for target, figure, met in checks:
        table.add_row(target, figure, {True: "met", False: "not met", None: "-"}[met])
    console.print(table)


def show_repeats(lines: Sequence[tuple[str, Sequence[str], str]]) -> None:
    """Print the figures of all runs of each target that was repeated."""
    if lines:
        table = Table("target", *(f"run {k + 1}" for k in range(len(lines[0][1]))), "", title="Targets within 5%")
        for target, seen, verdict in lines:
            table.add_row(target, *seen, verdict)
        console.print(table)
