"""The tables of a study as Markdown."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations

from mlopt.recipes.tapweight.spread import Spread

from .aims import METHOD, aims
from .comparison import correlation
from .plan import PLAIN
from .results import REFERENCE, Regime, regimes
from .rows import Row

__all__ = ["markdown"]


def markdown(rows: Sequence[Row]) -> str:
    """Return all tables of the rows, regime by regime."""
    parts = by_labels(rows)
    for regime in regimes(rows):
        parts += [f"## {regime.title}", f"{regime.subtitle}.", scores(regime), gains(regime), headroom(regime)]
        parts += [weights(regime, method) for method in regime.weighing()]
        parts += [cost(regime), aims(regime)]
    return "\n\n".join(part for part in parts if part)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose first column is text and whose others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by_labels(rows: Sequence[Row]) -> list[str]:
    """Return, for each plan and way of finetuning with several numbers of labels, a table of the scores by task and number."""
    groups: dict[tuple[str, str], list[Regime]] = defaultdict(list)
    for regime in regimes(rows):
        groups[regime.plan, regime.finetuning].append(regime)
    return [_label_table(sorted(group, key=_size)) for group in groups.values() if len(group) > 1]


def _size(regime: Regime) -> float:
    return math.inf if regime.labels == "all" else int(regime.labels)


def _label_table(group: Sequence[Regime]) -> str:
    """Return the table of regimes that differ in the number of labels; a method has a column if all of them hold it."""
    names = [method for method in group[0].methods if all(method in regime.methods for regime in group)]
    tasks = dict.fromkeys(task for regime in group for task in regime.tasks)
    body = []
    for task in tasks:
        for regime in group:
            if task in regime.tasks:
                column = _score_column(regime, task, names)
                body.append([_heading(regime, task), regime.labels, *(column[name] for name in names)])
    note = (
        "Test scores by number of labels, mean (standard deviation) over the seeds; ▲ better and ▼ worse than equal weights: "
        "paired t test at 5%, Holm's correction over the tasks of a number of labels."
    )
    return f"{note}\n\n{table(['task', 'labels', *(group[0].titles[name] for name in names)], body)}"


def scores(regime: Regime) -> str:
    """Return the scores of the methods but the single objectives."""
    ranking = regime.ranking()
    methods = [method for method in regime.methods if not method.startswith("single:")]
    if not methods:
        return ""
    seeds = {len(regime.scores(method, task)) for method in methods for task in regime.tasks} - {0}
    number = str(max(seeds)) if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    note = f"Test scores, mean (standard deviation) over {number} seed{'s' * (number != '1')}; the best mean is bold. "
    note += "▲ better and ▼ worse than equal weights: paired t test at 5%, Holm's correction over the tasks."
    if ranking is not None and len(ranking.means) > 1 and ranking.tasks > 1:
        note += (
            f" Mean rank over {ranking.tasks} tasks among all {len(ranking.means)} methods, single objectives included; "
            f"Friedman's p = {ranking.p:.2g}, critical difference {ranking.critical:.2f} (Nemenyi, 5%)."
        )
    return f"{note}\n\n{_score_table(regime, 'method', {method: regime.titles[method] for method in methods})}"


def gains(regime: Regime, method: str = METHOD) -> str:
    """Return the differences of a method from equal weights by task; empty if the regime lacks either."""
    body = [
        [
            task,
            f"{own.gain:+.3f}",
            f"{own.wins} of {own.seeds}",
            f"{own.p:.3f}",
            f"{own.signed_rank:.3f}",
            f"{own.adjusted:.3f}",
        ]
        for task, own in (regime.differences(method) if method in regime.methods else {}).items()
    ]
    if not body:
        return ""
    note = (
        f"{regime.titles[method]} against equal weights: mean gain in the metric (positive if better), seeds in which it is "
        "better, p of a paired t test and of Wilcoxon's signed-rank test, and the former after Holm's correction over the tasks:"
    )
    return f"{note}\n\n{table(['task', 'gain', 'better in', 'p', 'p, signed rank', 'adjusted p'], body)}"


def headroom(regime: Regime) -> str:
    """Return the scores of each objective alone, beside equal weights and no pretraining."""
    singles = {name: name.removeprefix("single:") for name in regime.methods if name.startswith("single:")}
    if not singles:
        return ""
    ends = {name: regime.titles[name] for name in ("direct", REFERENCE) if name in regime.methods}
    return f"Each objective alone:\n\n{_score_table(regime, 'objective', ends | singles)}"


def _score_table(regime: Regime, corner: str, names: dict[str, str]) -> str:
    ranking = regime.ranking()
    mean_ranks = ranking.means if ranking else {}
    columns = [_score_column(regime, task, list(names)) for task in regime.tasks]
    body = [
        [title, *(column[name] for column in columns), f"{mean_ranks[name]:.2f}" if name in mean_ranks else "-"]
        for name, title in names.items()
    ]
    return table([corner, *(_heading(regime, task) for task in regime.tasks), "mean rank"], body)


def _heading(regime: Regime, task: str) -> str:
    """Return a task with its metric and the direction that is better."""
    return f"{task}, {regime.metrics[task]} {'↑' if regime.better[task] else '↓'}"


def _score_column(regime: Regime, task: str, names: Sequence[str]) -> dict[str, str]:
    """Return the cell of each method on a task; the best means are bold."""
    spreads = {name: Spread.of(list(values.values())) for name in names if (values := regime.scores(name, task))}
    pick = max if regime.better[task] else min
    best = pick((spread.mean for spread in spreads.values()), default=None)
    cells = dict.fromkeys(names, "-")
    for name, spread in spreads.items():
        difference = regime.differences(name).get(task)
        text = f"**{spread}**" if spread.mean == best else str(spread)
        cells[name] = text + (difference.mark if difference is not None else "")
    return cells


def weights(regime: Regime, method: str) -> str:
    """Return the weights of a method by objective and task, with the runs in which they are significant."""
    objectives = list(dict.fromkeys(name for row in regime.rows for name in row["objectives"]))
    control, body = regime.control(), []
    for name in objectives:
        cells = []
        for task in regime.tasks:
            own = [row for row in regime.of(method, task) if row["weights"] and name in row["weights"]]
            cells.append(_weight_cell(name, own))
        body.append([f"{name} (control)" if name == control else name, *cells])
    if control is not None:
        body.append(["control / equal share", *(_ratio(regime, method, task) for task in regime.tasks)])
    body.append(["correlation between seeds", *(_agreement(regime, method, task) for task in regime.tasks)])
    title = f"Weights of {regime.titles[method]}, mean (standard deviation); the runs in which the objective is significant:"
    return f"{title}\n\n{table(['objective', *regime.tasks], body)}"


def _weight_cell(name: str, rows: Sequence[Row]) -> str:
    if not rows:
        return "-"
    judged = [row for row in rows if row["judged"]]
    tested = f"; {sum(name in row['significant'] for row in judged)} of {len(judged)}" if judged else ""
    return f"{Spread.of([row['weights'][name] for row in rows])}{tested}"


def _ratio(regime: Regime, method: str, task: str) -> str:
    """Return the control's weight over its equal share, 1 / K."""
    values = [
        row["weights"][row["control"]] * len(row["weights"])
        for row in regime.of(method, task)
        if row["weights"] and row["control"]
    ]
    return str(Spread.of(values)) if values else "-"


def _agreement(regime: Regime, method: str, task: str) -> str:
    """Return the mean correlation of the weights of two seeds."""
    own = [list(row["weights"].values()) for row in regime.of(method, task) if row["weights"]]
    pairs = [correlation(x, y) for x, y in combinations(own, 2)]
    return f"{statistics.fmean(pairs):.2f}" if pairs else "-"


def cost(regime: Regime) -> str:
    """Return the steps, passes, time and memory of each method by device; later tasks share parts of the first one's work."""
    header = ["method", "steps", "encoder passes", "seconds", "peak MiB"]
    parts = []
    for device in dict.fromkeys(row["environment"]["device"] for row in regime.rows):
        body = []
        for method in regime.methods:
            rows = [row for row in regime.rows if (row["method"], row["environment"]["device"]) == (method, device)]
            if method == PLAIN or not rows:
                continue
            memory = [row["memory"] for row in rows if row["memory"] is not None]
            body.append(
                [
                    regime.titles[method],
                    f"{statistics.fmean(row['steps'] for row in rows):,.0f}",
                    f"{statistics.fmean(row['passes'] for row in rows):,.0f}",
                    f"{max(row['seconds'] for row in rows):,.1f}",
                    f"{max(memory):,.0f}" if memory else "-",
                ]
            )
        if body:
            note = f"Cost of adaptation ({device}), time and memory of the longest run:"
            parts.append(f"{note}\n\n{table(header, body)}")
    return "\n\n".join(parts)
