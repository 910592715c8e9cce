"""The rows of one regime: scores by method and task, paired differences from equal weights, and ranks."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence

import attrs

from .comparison import Ranking, holm, paired_t, ranks, wilcoxon
from .plan import PLAIN
from .rows import Row

__all__ = ["Difference", "Regime", "regimes"]

REFERENCE = "equal"


@attrs.frozen
class Difference:
    """A method against the reference on one task, over the seeds that have both.

    Attributes:
        gain: the mean difference, positive if the method is better.
        wins: the seeds in which the method is better.
        seeds: the number of seeds.
        p: of the paired t test.
        signed_rank: the p of Wilcoxon's test.
        adjusted: p after Holm's correction over the tasks.
    """

    gain: float
    wins: int
    seeds: int
    p: float
    signed_rank: float
    adjusted: float

    @property
    def mark(self) -> str:
        """A mark for a difference that is significant at 5%."""
        if self.adjusted >= 0.05:
            return ""
        return " ▲" if self.gain > 0 else " ▼"


class Regime:
    """The rows of one plan, number of labels and way of finetuning.

    Args:
        rows: the rows.
        finetuning: "probe" or "full".

    Attributes:
        plan: the key of the plan.
        labels: the number of labels, or "all".
    """

    def __init__(self, rows: Sequence[Row], finetuning: str) -> None:
        self.rows = rows
        first = rows[0]
        self.plan, self.finetuning, self.labels = first["key"], finetuning, str(first["labels"])
        labels = "all labels" if first["labels"] == "all" else f"{first['labels']} labels"
        head = "ridge head on frozen features" if finetuning == "probe" else "finetuned as a whole"
        # Texts have official test files; of a user's table, half is the test set.
        split = "half of the groups as the test set, " if first["split"] == "half" else "the customary split, "
        if first["modality"] == "text":
            split = ""
        self.title = f"{first['modality']}, {labels}, {head}"
        self.subtitle = f"{split}{first['budget']:,} encoder passes, plan {first['key']}"
        self.tasks = tuple(dict.fromkeys(row["task"] for row in rows))
        self.methods = tuple(dict.fromkeys(row["method"] for row in rows))
        self.titles = {row["method"]: row["title"] for row in rows}
        self.better = {row["task"]: bool(row["greater_is_better"]) for row in rows}
        self.metrics = {row["task"]: str(row["metric"]) for row in rows}
        self._scores: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
        for row in rows:
            self._scores[row["method"], row["task"]][row["seed"]] = row["score"]

    def scores(self, method: str, task: str) -> dict[int, float]:
        """Return the scores of a method on a task by seed."""
        return self._scores.get((method, task), {})

    def differences(self, method: str, reference: str = REFERENCE) -> dict[str, Difference]:
        """Return the differences of a method from the reference by task, with p values corrected over the tasks."""
        by_task: dict[str, list[float]] = {}
        for task in self.tasks:
            own, other = self.scores(method, task), self.scores(reference, task)
            sign = 1 if self.better[task] else -1
            if shared := [seed for seed in own if seed in other]:
                by_task[task] = [sign * (own[seed] - other[seed]) for seed in shared]
        values = [paired_t(differences) for differences in by_task.values()]
        return {
            task: Difference(
                gain=statistics.fmean(differences),
                wins=sum(difference > 0 for difference in differences),
                seeds=len(differences),
                p=p,
                signed_rank=wilcoxon(differences),
                adjusted=adjusted,
            )
            for (task, differences), p, adjusted in zip(by_task.items(), values, holm(values), strict=True)
        }

    def ranking(self) -> Ranking | None:
        """Return the ranking by mean score over the tasks, of the methods that have a row on each; None without one."""
        return Ranking.of(blocks) if (blocks := list(self.blocks())) and blocks[0] else None

    def blocks(self) -> Iterable[dict[str, float]]:
        """Yield the ranks of the methods that have a row on every task, task by task."""
        common = [name for name in self.methods if all(self.scores(name, task) for task in self.tasks)]
        for task in self.tasks:
            means = {name: statistics.fmean(self.scores(name, task).values()) for name in common}
            yield ranks(means, greater_is_better=self.better[task])

    def weighing(self) -> tuple[str, ...]:
        """Return the methods that learn weights."""
        return tuple(
            method
            for method in self.methods
            if method != REFERENCE
            and not method.startswith("single:")
            and any(row["weights"] for row in self.rows if row["method"] == method)
        )

    def of(self, method: str, task: str) -> list[Row]:
        """Return the rows of a method on a task."""
        return [row for row in self.rows if (row["method"], row["task"]) == (method, task)]

    def control(self) -> str | None:
        """Return the name of the control, the objective that is useless by construction."""
        return next((row["control"] for row in self.rows if row["control"]), None)


def regimes(rows: Sequence[Row]) -> list[Regime]:
    """Return the rows by plan, number of labels and way of finetuning; the row without an encoder joins each way."""
    groups: dict[tuple[str, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    plain: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        place = row["key"], str(row["labels"])
        if row["method"] == PLAIN:
            plain[place].append(row)
        else:
            groups[place][row["finetuning"]].append(row)
    return [
        Regime([*plain[place], *own], finetuning)
        for place in dict.fromkeys([*plain, *groups])
        for finetuning, own in (groups[place] or {"probe": []}).items()
    ]
