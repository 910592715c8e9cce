"""The cost of the methods by the number of objectives: time, peak memory and encoder passes of the same number of steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import attrs
import torch

from mlopt.recipes.tapweight.experiment import Experiment
from mlopt.recipes.tapweight.methods import METHODS, Equal, Method, ThreeLevels
from mlopt.solving.engine import Engine

from ..hypergrad.measuring import peak_memory
from ..report import interleaved, write
from .options import parser, plan_of, standard_of
from .plan import Plan
from .study import modality_of
from .tables import table
from .variants import method_of

__all__ = ["iteration_ratio", "main", "measure"]

COUNTS = (1, 2, 4, 8)
_METHODS = tuple(name for name in ("equal", "tapweight", "rehearsal") if name in METHODS)
#: A run this short holds as much memory as a long one.
_MEMORY_STEPS = 10


def main(arguments: Sequence[str]) -> int:
    """Measure and print the cost; return the exit status."""
    modality = arguments[0] if arguments and arguments[0] in ("molecules", "text") else "molecules"
    own = parser(modality)
    own.prog = f"python -m benchmarks.tapweight cost {modality}"
    own.description = __doc__
    own.add_argument("--steps", type=int, default=50, metavar="N", help="pretraining steps of each run")
    own.add_argument("--rounds", type=int, default=3, metavar="N", help="interleaved runs; the median is reported")
    options = own.parse_args(arguments[1:] if arguments and arguments[0] == modality else arguments)
    plan = plan_of(standard_of(modality), options)
    if plan.device == "cpu":
        torch.set_num_threads(1)
    experiment = experiment_of(plan)
    counts = [count for count in COUNTS if count <= len(experiment.objectives)]
    methods = [method_of(name) for name in (options.methods or _METHODS)]
    rows = [row for count in counts for row in measure(experiment, methods, count, options.steps, options.rounds)]
    ratios = {every: iteration_ratio(experiment, every, 10 * options.rounds) for every in (1, 4)}
    print(markdown(rows, ratios))
    write(options.json, plan.device, {"runs": rows, "iteration": ratios})
    return 0


def experiment_of(plan: Plan) -> Experiment:
    """Return the experiment of the first task and seed of a plan."""
    modality = modality_of(plan)
    name, seed = plan.tasks[0], plan.seeds[0]
    task = modality.task(name, seed, plan.labels[0])
    return modality.recipe(modality.corpus_of(name), task, seed).experiment(1, progress=False)


def measure(
    experiment: Experiment, methods: Sequence[Method], count: int, steps: int, rounds: int
) -> list[dict[str, Any]]:
    """Return a row for each method with the first `count` objectives.

    Args:
        experiment: the start and the batches.
        methods: the methods. Time is relative to the first.
        count: the number of objectives.
        steps: pretraining steps of each run.
        rounds: runs of each method, interleaved.
    """
    device = experiment.device.type
    # Without the prepared start, which has a head for every objective.
    own = attrs.evolve(experiment, objectives=experiment.objectives[:count], steps=steps, start=None)
    own.prepare()
    times = interleaved([partial(method.adapt, own) for method in methods], rounds, device, warm_up=0)
    short = attrs.evolve(own, steps=min(steps, _MEMORY_STEPS), settings=attrs.evolve(own.settings, measurements=2))
    return [
        {
            "objectives": count,
            "method": method.name,
            "title": method.title,
            "steps": steps,
            "passes": method.passes(own),
            "seconds": seconds,
            "relative": seconds / times[0],
            "memory": peak_memory(partial(method.adapt, short), device) / 2**20,
        }
        for method, seconds in zip(methods, times, strict=True)
    ]


def iteration_ratio(experiment: Experiment, every: int, rounds: int) -> float:
    """Return the time of an outer step of the three levels with `every` pretraining steps over as many plain steps."""
    own = attrs.evolve(experiment, steps=1_000, settings=attrs.evolve(experiment.settings, every=every))
    whole, plain = (method.problem(own, own.model()) for method in (ThreeLevels(), Equal()))
    engines = Engine(whole, seed=0), Engine(plain, seed=0)

    def plain_steps() -> None:
        for _ in range(every):
            engines[1].step()

    steps: list[Callable[[], Any]] = [engines[0].step, plain_steps]
    ours, theirs = interleaved(steps, rounds, own.device.type, warm_up=2)
    return ours / theirs


def markdown(rows: Sequence[dict[str, Any]], ratios: dict[int, float]) -> str:
    """Return the tables of the cost."""
    body = [
        [
            str(row["objectives"]),
            row["title"],
            f"{row['passes'] / row['steps']:.1f}",
            f"{row['passes']:,}",
            f"{1e3 * row['seconds'] / row['steps']:.1f}",
            f"{row['seconds']:.1f}",
            f"{row['relative']:.2f}",
            f"{row['memory']:.1f}",
        ]
        for row in rows
    ]
    header = [
        "objectives",
        "method",
        "passes a step",
        "in all",
        "ms a step",
        "seconds in all",
        "time / first method",
        "peak MiB",
    ]
    steps = rows[0]["steps"]
    lines = [f"{every} step{'s' * (every > 1)}: {ratio:.2f}" for every, ratio in ratios.items()]
    return (
        f"Cost of {steps} pretraining steps, measurements included:\n\n{table(header, body)}\n\n"
        f"An iteration of the three levels relative to plain steps on as many batches, weights moved every {', '.join(lines)}."
    )
