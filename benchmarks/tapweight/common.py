"""What the benchmarks of both modalities share: the cost of an iteration, a row for each run, and the tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import attrs
from rich.table import Table

from mlopt.recipes.tapweight.recipe import TapWeight
from mlopt.recipes.tapweight.result import TapWeightResult
from mlopt.solving.engine import Engine

from ..report import interleaved

__all__ = ["WAYS", "cost", "row_of", "tables"]

WAYS = ("direct", "equal", "tapweight")


def cost(tapweight: TapWeight, every: int, rounds: int, device: str) -> float:
    """Return the time of an outer step with `every` pretraining steps over that of `every` plain pretraining steps."""
    tapweight.settings = attrs.evolve(tapweight.settings, every=every)
    whole, plain = tapweight.problem(1_000)[0], tapweight.equal_weights(1_000)
    engines = Engine(whole, seed=0), Engine(plain, seed=0)

    def plain_steps() -> None:
        for _ in range(every):
            engines[1].step()

    ours, theirs = interleaved([engines[0].step, plain_steps], rounds, device, warm_up=2)
    return ours / theirs


def row_of(task: str, seed: int, result: TapWeightResult) -> dict[str, Any]:
    """Return what a run gave, to be written."""
    return {
        "task": task,
        "metric": result.metric,
        "seed": seed,
        "scores": result.scores,
        "weights": result.weights,
        "signals": {name: attrs.asdict(signal) for name, signal in result.signals.items()},
    }


def tables(rows: Sequence[dict[str, Any]], costs: dict[int, float], objectives: Sequence[str]) -> list[Table]:
    """Return scores, weights and cost as tables."""
    tasks = dict.fromkeys(row["task"] for row in rows)
    scores = Table(
        "task", "metric", *WAYS, title=f"Test scores, mean (standard deviation) over {len(rows) // len(tasks)} seeds"
    )
    weights = Table(
        "objective", *tasks, title="Learned weights, mean (standard deviation); in how many runs significant"
    )
    for task in tasks:
        own = [row for row in rows if row["task"] == task]
        scores.add_row(task, own[0]["metric"], *(_spread([row["scores"][way]["test"] for row in own]) for way in WAYS))
    for name in objectives:
        cells = []
        for task in tasks:
            own = [row for row in rows if row["task"] == task]
            clear = sum(row["signals"][name]["significant"] for row in own)
            cells.append(f"{_spread([row['weights'][name] for row in own])}; {clear} of {len(own)}")
        weights.add_row(name, *cells)
    time = Table(
        "lambda moves every",
        "time over plain pretraining",
        title="Cost of an iteration, the measurements of signals apart",
    )
    for every, ratio in costs.items():
        time.add_row(f"{every} steps" if every > 1 else "step", f"{ratio:.2f}")
    return [scores, weights, time]


def _spread(values: Sequence[float]) -> str:
    deviation = f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"
