"""Shared by the benchmarks of both modalities: the cost of an iteration, a row for each run, and the tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
from rich.console import Console
from rich.table import Table

from mlopt.recipes.tapweight.methods import DEFAULT, Equal, ThreeLevels
from mlopt.recipes.tapweight.recipe import TapWeight
from mlopt.recipes.tapweight.result import TapWeightResult
from mlopt.recipes.tapweight.spread import Spread
from mlopt.solving.engine import Engine

from ..report import interleaved, write

__all__ = ["run"]


def cost(tapweight: TapWeight, every: int, rounds: int, device: str) -> float:
    """Return the time of an outer step with `every` pretraining steps relative to `every` plain pretraining steps."""
    experiment = tapweight.experiment(1_000)
    experiment = attrs.evolve(experiment, settings=attrs.evolve(experiment.settings, every=every))
    whole, plain = (method.problem(experiment, experiment.model()) for method in (ThreeLevels(), Equal()))
    engines = Engine(whole, seed=0), Engine(plain, seed=0)

    def plain_steps() -> None:
        for _ in range(every):
            engines[1].step()

    ours, theirs = interleaved([engines[0].step, plain_steps], rounds, device, warm_up=2)
    return ours / theirs


def run(
    recipe: Callable[[str, int], TapWeight], size: Any, *, rounds: int, cost_only: bool, device: str, json: str | None
) -> None:
    """Measure the cost of an iteration, run each task with each seed, write the results and print their tables.

    Args:
        recipe: returns TapWeight for a task and a seed.
        size: `tasks`, `seeds`, `steps`, and other attributes that the results record.
        rounds: number of rounds of the cost measurement.
        cost_only: if True, stop after the cost measurement.
        device: cpu or cuda.
        json: the results file, rewritten after each run, so that a later failure loses no results.
    """
    console = Console()
    costs = {every: cost(recipe(size.tasks[0], size.seeds[0]), every, rounds, device) for every in (1, 4)}
    rows: list[dict[str, Any]] = []
    write(json, device, {"size": attrs.asdict(size), "runs": rows, "cost": costs})
    for seed in () if cost_only else size.seeds:
        for task in size.tasks:
            result = recipe(task, seed).fit(size.steps)
            console.print(f"{task}, seed {seed}: {result.verdict}", markup=False)
            rows.append(row_of(task, seed, result))
            write(json, device, {"size": attrs.asdict(size), "runs": rows, "cost": costs})
    for table in tables(rows, costs):
        console.print(table)


def row_of(task: str, seed: int, result: TapWeightResult) -> dict[str, Any]:
    """Return the results of a run as plain data."""
    return {
        "task": task,
        "metric": result.metric,
        "seed": seed,
        "scores": result.scores,
        "weights": result.weights,
        "signals": {name: attrs.asdict(signal) for name, signal in result.signals.items()},
    }


def tables(rows: Sequence[dict[str, Any]], costs: dict[int, float]) -> list[Table]:
    """Return scores, weights and cost as tables; only the cost if there are no rows."""
    time = Table(
        "lambda moves every", "time / plain pretraining", title="Cost of an iteration, without the measurements"
    )
    for every, ratio in costs.items():
        time.add_row(f"{every} steps" if every > 1 else "step", f"{ratio:.2f}")
    if not rows:
        return [time]
    tasks = dict.fromkeys(row["task"] for row in rows)
    scores = Table(
        "task", "metric", *DEFAULT, title=f"Test scores, mean (standard deviation) over {len(rows) // len(tasks)} seeds"
    )
    weights = Table(
        "objective", *tasks, title="Learned weights, mean (standard deviation); runs in which it is significant"
    )
    for task in tasks:
        own = [row for row in rows if row["task"] == task]
        scores.add_row(
            task, own[0]["metric"], *(str(Spread.of([row["scores"][name]["test"] for row in own])) for name in DEFAULT)
        )
    for name in rows[0]["weights"]:
        cells = []
        for task in tasks:
            own = [row for row in rows if row["task"] == task]
            clear = sum(row["signals"][name]["significant"] for row in own)
            cells.append(f"{Spread.of([row['weights'][name] for row in own])}; {clear} of {len(own)}")
        weights.add_row(name, *cells)
    return [scores, weights, time]
