"""The aims of the study, judged on its rows: met, missed, or not measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import combinations

from .comparison import correlation
from .plan import PLAIN
from .results import REFERENCE, Regime
from .rows import Row

__all__ = ["METHOD", "aims"]

#: The method that the aims are for.
METHOD = "rehearsal"


def aims(regime: Regime, method: str = METHOD) -> str:
    """Return a Markdown table of the aims for a method; empty if the regime lacks it or equal weights."""
    if not {method, REFERENCE} <= set(regime.methods):
        return ""
    lines = [
        f"| {aim} | {figure} | {'met' if met else 'missed'} |"
        for aim, figure, met in (*_scores(regime, method), *_weights(regime, method))
    ]
    return "\n".join([f"| aim for {regime.titles[method]} | measured | |", "|---|---:|---|", *lines])


def _scores(regime: Regime, method: str) -> list[tuple[str, str, bool]]:
    differences = regime.differences(method).values()
    better = sum(one.gain > 0 and one.adjusted < 0.05 for one in differences)
    worse = sum(one.gain < 0 and one.adjusted < 0.05 for one in differences)
    checks = [
        (
            "significantly better than equal weights on at least half of the tasks",
            f"{better} of {len(differences)}",
            2 * better >= len(differences),
        ),
        ("significantly worse on none", f"{worse} of {len(differences)}", not worse),
    ]
    ranking = regime.ranking()
    if ranking is not None and method in ranking.means:
        # The row without an encoder adapts nothing and has no budget.
        order = [name for name in ranking.means if name != PLAIN]
        place = order.index(method) + 1
        checks.insert(0, ("the first mean rank at equal budget", f"{place} of {len(order)}", place == 1))
    return checks


def _weights(regime: Regime, method: str) -> list[tuple[str, str, bool]]:
    rows = [row for row in regime.rows if row["method"] == method and row["weights"]]
    checks = []
    with_control = [row for row in rows if row["control"]]
    clear = [_share(row) for row in with_control if row["significant"]]
    unclear = [_share(row) for row in with_control if not row["significant"]]
    if clear:
        below = sum(share < 0.25 for share in clear)
        figure = f"{below} of {len(clear)}"
        checks.append(
            (
                "the control below a quarter of its share in 9 of 10 significant runs",
                figure,
                below >= 0.9 * len(clear),
            )
        )
    if unclear:
        below = sum(share <= 1 for share in unclear)
        checks.append(
            ("the control at most at its share in the other runs", f"{below} of {len(unclear)}", below == len(unclear))
        )
    if agreements := _agreements(regime, method):
        checks.append(
            (
                "weights of two seeds correlate at .7 on each task with a significant verdict",
                f"{sum(value >= 0.7 for value in agreements)} of {len(agreements)}",
                min(agreements) >= 0.7,
            )
        )
    return checks


def _share(row: Row) -> float:
    """Return the control's weight over its equal share."""
    return float(row["weights"][row["control"]] * len(row["weights"]))


def _agreements(regime: Regime, method: str) -> list[float]:
    """Return the mean correlation of two significant runs on each task that has two."""
    means = []
    for task in regime.tasks:
        own: Sequence[Row] = [row for row in regime.of(method, task) if row["weights"] and row["significant"]]
        pairs = [correlation(list(x["weights"].values()), list(y["weights"].values())) for x, y in combinations(own, 2)]
        if pairs:
            means.append(statistics.fmean(pairs))
    return means
