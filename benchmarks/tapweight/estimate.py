"""Estimates of the rows that a plan computes, their encoder passes, and their time on this machine."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import attrs

from mlopt.durations import in_words
from mlopt.errors import MloptError
from mlopt.recipes.tapweight.exact_head import labelled_features
from mlopt.recipes.tapweight.experiment import Experiment
from mlopt.recipes.tapweight.methods import Method

from .plan import PLAIN, Cell, Plan
from .study import missing_cells, modality_of
from .tables import table
from .variants import method_of

__all__ = ["estimate"]


@attrs.frozen
class _Times:
    """Measured times of a task, in seconds: a pass of pretraining, and features of the labelled and of the test examples."""

    experiment: Experiment
    labelled: float
    test: float


def estimate(plan: Plan, file: Path) -> str:
    """Return the missing rows of a plan, their encoder passes and their time, method by method, as Markdown.

    A task or a method that cannot be run is named, with the reason.

    Times are those of one process, from a few passes with the first seed. Full finetuning is not in them, and neither are the
    passes inside a linear solver.

    Args:
        plan: the plan.
        file: the file of the rows, which need not exist.
    """
    missing = [cell for cells in missing_cells(plan, file).values() for cell in cells]
    times, faults = _all_times(plan, dict.fromkeys(cell.task for cell in missing))
    body, count, total = [], 0, 0.0
    for name in dict.fromkeys(cell.method for cell in missing):
        own = [cell for cell in missing if cell.method == name and cell.task in times]
        try:
            passes, seconds = _cost(plan, name, own, times)
        except MloptError as error:
            faults.append(f"{name}: {error}")
            continue
        body.append([name, str(len(own)), f"{passes:,}", f"{seconds / 60:,.1f}"])
        count, total = count + len(own), total + seconds
    shown = table(["method", "rows", "encoder passes", "core minutes"], body)
    time_needed = f"{count} rows to compute: about {in_words(total)} in one process."
    return "\n\n".join([shown, *(f"Cannot be computed: {fault}" for fault in faults), time_needed])


def _all_times(plan: Plan, tasks: Iterable[str]) -> tuple[dict[str, _Times], list[str]]:
    """Return the times of each task, and a sentence for each that cannot be run; tasks of one corpus share what is prepared."""
    modality, seed = modality_of(plan), plan.seeds[0]
    starts: dict[str, Experiment] = {}
    times, faults = {}, []
    for name in tasks:
        corpus = modality.corpus_of(name)
        try:
            task = modality.task(name, seed, plan.labels[0])
            if corpus not in starts:
                starts[corpus] = modality.recipe(corpus, task, seed).experiment(1, progress=False)
        except MloptError as error:
            faults.append(f"{name}: {error}")
            continue
        times[name] = _times(attrs.evolve(starts[corpus], task=task))
    return times, faults


def _times(experiment: Experiment) -> _Times:
    laps = [time.perf_counter()]
    for splits in (("train", "valid"), ("test",)):
        labelled_features(experiment.encoder, experiment.task, splits)  # type: ignore[arg-type]
        laps.append(time.perf_counter())
    return _Times(experiment, laps[1] - laps[0], laps[2] - laps[1])


def _cost(plan: Plan, name: str, cells: Sequence[Cell], times: dict[str, _Times]) -> tuple[int, float]:
    """Return the passes and the seconds of the rows of a method."""
    scoring = sum(times[cell.task].labelled + times[cell.task].test for cell in cells)
    if name == PLAIN:
        return 0, 0.0
    method, modality = method_of(name), modality_of(plan)
    runs = {(cell.seed, modality.corpus_of(cell.task), cell.task, cell.labels) for cell in cells}
    by_start: dict[tuple[int, str], list[str]] = defaultdict(list)
    for seed, corpus, task, _ in sorted(runs, key=str):
        by_start[seed, corpus].append(task)
    passes, seconds = 0, scoring
    for tasks in by_start.values():
        # All tasks of a seed and a corpus share what does not depend on labels.
        experiment = times[tasks[0]].experiment
        each = experiment.affordable(method, plan.passes)
        method.check(each.settings, each.steps, each.names)
        shared, count = _rehearsals(method, each), len(tasks)
        own = method.passes(each) * (count if method.uses_labels else 1) - shared * (count - 1)
        passes, seconds = passes + own, seconds + experiment.seconds(own)
        if shared:
            arms = experiment.settings.rehearsals * len(experiment.names)
            seconds += arms * sum(times[task].labelled for task in tasks)
    return passes, seconds


def _rehearsals(method: Method, experiment: Experiment) -> int:
    """Return the passes of the rehearsals of a method; 0 if it has none that tasks share."""
    own = getattr(method, "rehearsals", None)
    return int(own(experiment)) if own is not None else 0
