"""The figures, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw"]

Row = dict[str, Any]
MARKERS = "osD^vXP*<>"


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw a figure for each case and section with rows; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    accuracy = _of(rows, "accuracy", "error", "time")
    files = []
    for case in dict.fromkeys(row["case"] for row in accuracy):
        chosen = [row for row in accuracy if row["case"] == case and row["error"] > 0]
        name = "".join(letter if letter.isalnum() else "_" for letter in case)
        files.append(_plot(folder / f"error_time_{name}.png", chosen, "time", "error", "time / plain gradient", case))
    iterated = [row for row in accuracy if row["iterations"] and "quadratic" not in row["case"] and row["error"] > 0]
    deep = {row["case"] for row in iterated if row["iterations"] == 100}
    for case in deep:
        chosen = [row for row in iterated if row["case"] == case]
        name = "".join(letter if letter.isalnum() else "_" for letter in case)
        files.append(_plot(folder / f"error_iterations_{name}.png", chosen, "iterations", "error", "iterations", case))
    ladder, unroll = _of(rows, "ladder", "time / one rung"), _of(rows, "unroll", "memory")
    if ladder:
        files.append(_plot(folder / "ladder.png", ladder, "rungs", "time / one rung", "rungs", "ladder", x_log=False))
    if unroll:
        files.append(
            _plot(folder / "unroll_memory.png", unroll, "iterations", "memory", "steps", "unrolling: memory / plain")
        )
    return files


def _of(rows: Sequence[Row], section: str, *having: str) -> list[Row]:
    return [row for row in rows if row["section"] == section and all(key in row for key in having)]


def _plot(file: Path, rows: Sequence[Row], x: str, y: str, x_label: str, title: str, *, x_log: bool = True) -> Path:
    """Draw y against x, one line for each estimator: solid with circles for mlopt, dotted with crosses for the others."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    for library, estimator in dict.fromkeys((row["library"], row["estimator"]) for row in rows):
        line = sorted((r[x], r[y]) for r in rows if (r["library"], r["estimator"]) == (library, estimator))
        style: dict[str, Any] = {
            "linestyle": "-" if library == "mlopt" else ":",
            "marker": "o" if library == "mlopt" else "x",
        }
        axes.plot(*zip(*line, strict=True), label=f"{library}: {estimator}", **style)
    axes.set(yscale="log", xlabel=x_label, ylabel=y, title=title, xscale="log" if x_log else "linear")
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
    return file
