"""The figures of a study, as PNG files: mean ranks, what each objective alone brings, and the weights."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .results import REFERENCE, Regime, regimes
from .rows import Row

__all__ = ["draw"]

#: The height of a bar, in which the points of the seeds stand one below the other.
_BAR = 0.8


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw the figures of each regime; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for regime in regimes(rows):
        first = regime.rows[-1]
        name = f"{first['modality']}-{first['labels']}-{first['finetuning']}-{first['key'][:6]}"
        files += [
            _saved(figure, folder / f"{kind}-{name}.png")
            for kind, figure in (
                ("ranks", ranks(regime)),
                ("headroom", headroom(regime)),
                *((f"weights-{method}", weights(regime, method)) for method in regime.weighing()),
            )
            if figure is not None
        ]
    return files


def _figure(*arguments: Any, **options: Any) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(*arguments, layout="constrained", **options)


def _saved(figure: Any, file: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(file, dpi=150)
    pyplot.close(figure)
    return file


def _grid(tasks: Sequence[str], bars: Sequence[str], *, sharex: bool) -> tuple[Any, Any]:
    """Return a figure with axes for each task, whose bars are named from the top down."""
    columns = min(3, len(tasks))
    lines = -(-len(tasks) // columns)
    size = (3.6 * columns + 1.5, (0.9 + 0.24 * len(bars)) * lines)
    figure, grid = _figure(lines, columns, figsize=size, sharex=sharex, sharey=True, squeeze=False)
    for axes in grid.flat[len(tasks) :]:
        axes.set_visible(False)
    grid[0, 0].invert_yaxis()
    return figure, grid


def ranks(regime: Regime) -> Any:
    """Return the critical-difference diagram: a bar joins methods whose mean ranks are not significantly apart."""
    ranking = regime.ranking()
    if ranking is None or len(ranking.means) < 2:
        return None
    names, groups = list(ranking.means), ranking.groups()
    figure, axes = _figure(figsize=(8, 1.2 + 0.28 * (len(names) + len(groups))))
    for row, name in enumerate(names):
        axes.plot([1, ranking.means[name]], [row, row], color="0.85", linewidth=1, zorder=1)
        axes.plot(ranking.means[name], row, "o", color="tab:blue" if name != REFERENCE else "tab:orange", zorder=2)
    for k, group in enumerate(groups):
        height = len(names) + 0.2 + 0.8 * k
        ends = [ranking.means[group[0]], ranking.means[group[-1]]]
        axes.plot(ends, [height, height], color="black", linewidth=3, solid_capstyle="butt")
    axes.set_yticks(range(len(names)), [f"{regime.titles[name]}  {ranking.means[name]:.2f}" for name in names])
    axes.set(
        xlim=(0.8, len(names) + 0.2),
        ylim=(len(names) + 0.2 + 0.8 * len(groups), -0.8),
        xlabel=f"mean rank over {ranking.tasks} tasks; black bars: not apart by {ranking.critical:.2f} (Nemenyi, 5%)",
        title=regime.title,
    )
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def headroom(regime: Regime) -> Any:
    """Return bars of the gain of each objective alone over equal weights, task by task, with standard deviations over seeds."""
    names = [name for name in regime.methods if name.startswith("single:")]
    names = [name for name in ("direct", *names) if name in regime.methods]
    tasks = [task for task in regime.tasks if regime.scores(REFERENCE, task)]
    if len(names) < 2 or not tasks:
        return None
    figure, grid = _grid(tasks, names, sharex=False)
    for axes, task in zip(grid.flat, tasks, strict=False):
        sign = 1 if regime.better[task] else -1
        base = regime.scores(REFERENCE, task)
        for row, name in enumerate(names):
            own = regime.scores(name, task)
            gains = [sign * (own[seed] - base[seed]) for seed in own if seed in base]
            if gains:
                deviation = statistics.stdev(gains) if len(gains) > 1 else 0
                mean = statistics.fmean(gains)
                axes.barh(row, mean, xerr=deviation, color="tab:blue" if mean > 0 else "tab:red", ecolor="0.4")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.locator_params(axis="x", nbins=5)
        axes.set_yticks(range(len(names)), [name.removeprefix("single:") for name in names])
        axes.set_title(f"{task}, {regime.metrics[task]}")
    figure.suptitle(f"Gain of each objective alone over equal weights (right is better)\n{regime.title}")
    return figure


def weights(regime: Regime, method: str) -> Any:
    """Return the weights of each seed as points with their bootstrap errors, if they have any, and the mean, task by task."""
    tasks = [task for task in regime.tasks if any(row["weights"] for row in regime.of(method, task))]
    if not tasks:
        return None
    objectives = list(dict.fromkeys(name for row in regime.rows for name in row["objectives"]))
    figure, grid = _grid(tasks, objectives, sharex=True)
    for axes, task in zip(grid.flat, tasks, strict=False):
        own = [row for row in regime.of(method, task) if row["weights"]]
        axes.axvline(1 / len(own[0]["weights"]), color="0.6", linestyle=":", label="equal share")
        for place, name in enumerate(objectives):
            if of_objective := [row for row in own if name in row["weights"]]:
                axes.barh(
                    place, statistics.fmean(row["weights"][name] for row in of_objective), color="tab:blue", alpha=0.4
                )
                _points(axes, place, name, of_objective)
        axes.set_yticks(range(len(objectives)), objectives)
        axes.set_title(task)
    grid[0, 0].set_xlim(left=0)
    grid[0, 0].legend(loc="lower right", fontsize=7)
    judged = any(row["weight_errors"] for row in regime.rows if row["method"] == method)
    spread = ", with its bootstrap standard error" if judged else ""
    title = f"Weights of {regime.titles[method]}: a point for each seed{spread}; filled if significant"
    figure.suptitle(f"{title}\n{regime.title}")
    return figure


def _points(axes: Any, place: int, name: str, rows: Sequence[Row]) -> None:
    """Draw the weight of an objective in each row as a point with its error, one below the other within the bar."""
    for k, row in enumerate(rows):
        weight, error = row["weights"][name], (row["weight_errors"] or {}).get(name, 0.0)
        height = place + _BAR * ((k + 0.5) / len(rows) - 0.5)
        # A weight is a share: it ends at 0 and at 1.
        axes.plot([max(0.0, weight - error), min(1.0, weight + error)], [height, height], color="tab:blue", linewidth=1)
        face = "tab:blue" if name in row["significant"] else "white"
        axes.plot(weight, height, "o", markersize=3.5, markerfacecolor=face, markeredgecolor="tab:blue", clip_on=False)
