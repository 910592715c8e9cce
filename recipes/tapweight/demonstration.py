"""Run a demonstration: one run for each seed, the outcome against the known facts, and the spread over the seeds."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs
from rich.console import Console
from rich.table import Table

from .methods import METHODS
from .recipe import TapWeight
from .result import TapWeightResult
from .spread import Spread

__all__ = ["Known", "conclusion", "show", "summary"]


@attrs.frozen(kw_only=True)
class Known:
    """Facts on a demonstration that are known beforehand.

    Attributes:
        control: the objective that is useless.
        suited: the objective that suits the task.
        why: a clause on why it suits the task.
        examples: a word for the examples.
    """

    control: str
    suited: str
    why: str
    examples: str


def show(
    arguments: Sequence[str],
    demonstration: Callable[[int], TapWeight],
    known: Known,
    *,
    steps: int,
    introduction: str,
    output: str,
    prog: str,
) -> None:
    """Run a demonstration.

    Args:
        arguments: the options.
        demonstration: returns the recipe of a seed.
        known: what is known beforehand.
        steps: pretraining steps.
        introduction: a paragraph on the demonstration.
        output: the default folder for the results.
        prog: the name of the command.
    """
    parser = argparse.ArgumentParser(prog=prog, description=introduction)
    parser.add_argument("--output", type=Path, default=Path(output), help=f"folder for the results (default: {output})")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run for each (default: 0)")
    options = parser.parse_args(arguments)
    console = Console()
    console.print(introduction, highlight=False)
    results = {}
    for seed in options.seeds:
        result = demonstration(seed).fit(steps)
        result.save(options.output if len(options.seeds) == 1 else options.output / f"seed-{seed}")
        for table in result.tables():
            console.print(table)
        console.print(result.verdict, highlight=False)
        results[seed] = result
    console.print(conclusion(list(results.values()), known), highlight=False)
    if len(results) > 1:
        for table in summary(list(results.values())):
            console.print(table)
    console.print(f"Saved in {options.output}.", highlight=False)


def conclusion(results: Sequence[TapWeightResult], known: Known) -> str:
    """Return how the control and the suited objective fared, and how the methods compare."""
    share, count = 1 / len(results[0].weights), len(results)
    below = sum(result.weights[known.control] < share for result in results)
    top = sum(max(result.weights, key=result.weights.__getitem__) == known.suited for result in results)
    better = {name: sum(_better(result, name) for result in results) for name in ("direct", "equal")}
    clear = sum(any(signal.significant for signal in result.signals.values()) for result in results)
    return (
        f"The control, {known.control}, ended below its equal share of {share:.3f} in {below} of {count} runs; {known.suited}, "
        f"{known.why}, had the largest weight in {top} of {count}. On the test {known.examples}, {results[0].main.title} was "
        f"better than equal weights in {better['equal']} of {count} and than direct finetuning in {better['direct']} of {count}. "
        f"At least one weight was significant in {clear} of {count} runs."
    )


def _better(result: TapWeightResult, method: str) -> bool:
    ours, theirs = result.main.scores["test"], result.scores[method]["test"]
    return ours > theirs if result.greater_is_better else ours < theirs


def summary(results: Sequence[TapWeightResult]) -> tuple[Table, Table]:
    """Return the weights and the scores over the seeds: means, standard deviations, how often below the equal share."""
    names, count = list(results[0].weights), len(results)
    weights = Table(
        "objective", "weight", "below the equal share", title=f"Mean (standard deviation) over {count} seeds"
    )
    for name in names:
        values = [result.weights[name] for result in results]
        weights.add_row(name, str(Spread.of(values)), f"{sum(value < 1 / len(names) for value in values)} of {count}")
    scores = Table("method", f"test {results[0].metric}")
    for name in results[0].scores:
        scores.add_row(METHODS[name].title, str(Spread.of([result.scores[name]["test"] for result in results])))
    return weights, scores
