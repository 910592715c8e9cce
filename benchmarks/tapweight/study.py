"""Run the rows of a plan that its file does not hold yet, seed by seed, in one or several processes."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import attrs
import torch

import mlopt
from mlopt.errors import MloptError
from mlopt.recipes.tapweight.experiment import Experiment
from mlopt.recipes.tapweight.methods import Adapted, Method
from mlopt.recipes.tapweight.task import Task

from ..report import environment
from .modality import Modality
from .plan import PLAIN, Cell, Plan
from .resources import Used, measured
from .rows import Rows
from .scoring import full, plain, probe
from .variants import method_of

__all__ = ["missing_cells", "modality_of", "run"]


def run(plan: Plan, file: Path, processes: int = 1) -> list[str]:
    """Compute the missing rows of a plan and append each to the file.

    Args:
        plan: what is run.
        file: the file of the rows, and of earlier runs.
        processes: seeds that run at the same time.

    Returns:
        A sentence for each cell that could not be run.
    """
    rows = Rows(file, plan.key)
    rows.start()
    jobs = [cells for cells in missing_cells(plan, file).values() if cells]
    print(f"{sum(map(len, jobs))} rows to compute, {len(rows.present())} in {file}.", flush=True)
    work = partial(_run_seed, plan, rows)
    if processes == 1:
        faults = [work(cells) for cells in jobs]
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            faults = list(pool.map(work, jobs))
    for folder in (_work(rows), _work(rows).parent):
        # The phases of a stopped seed, and of another plan, stay.
        with contextlib.suppress(OSError):
            folder.rmdir()
    return [fault for job in faults for fault in job]


def missing_cells(plan: Plan, file: Path) -> dict[int, list[Cell]]:
    """Return the rows of a plan that its file does not hold, by seed."""
    present, modality = Rows(file, plan.key).present(), modality_of(plan)
    return {
        seed: [cell for cell in plan.cells(seed) if cell not in present and _possible(cell, modality)]
        for seed in plan.seeds
    }


def modality_of(plan: Plan) -> Modality:
    """Return the modality of a plan."""
    if plan.modality == "molecules":
        from .molecules import MoleculeStudy

        return MoleculeStudy(plan)
    from .text import TextStudy

    return TextStudy(plan)


def _possible(cell: Cell, modality: Modality) -> bool:
    """Return False for an objective alone that the corpus of the task does not support."""
    kind, _, objective = cell.method.partition(":")
    return kind != "single" or objective in modality.objectives(modality.corpus_of(cell.task))


def _run_seed(plan: Plan, rows: Rows, cells: Sequence[Cell]) -> list[str]:
    """Compute rows of one seed; return a sentence for each that could not be computed."""
    if plan.device == "cpu":
        torch.set_num_threads(1)
    modality, faults = modality_of(plan), list[str]()
    seed = cells[0].seed
    by_corpus = sorted(cells, key=lambda cell: modality.corpus_of(cell.task))
    for corpus, of_corpus in groupby(by_corpus, key=lambda cell: modality.corpus_of(cell.task)):
        with SeedRun(modality, corpus, seed, rows) as seed_run:
            # Stable: the order of the plan within a corpus. All rows of a method stand together, so that they share an encoder.
            for _, group in groupby(of_corpus, key=lambda cell: cell.method):
                faults += seed_run.rows_of(list(group))
    return faults


def _work(rows: Rows) -> Path:
    """Return the folder of the phases of a plan, beside its rows."""
    return rows.file.with_suffix(".work") / rows.key


class SeedRun:
    """One seed on one corpus: the same start for every method and task.

    Args:
        modality: the data.
        corpus: the name of the corpus.
        seed: the seed.
        rows: where the rows go.
    """

    def __init__(self, modality: Modality, corpus: str, seed: int, rows: Rows) -> None:
        self.modality, self.plan, self.corpus, self.seed, self.rows = modality, modality.plan, corpus, seed, rows
        #: Holds phases of methods that several tasks share.
        self.folder = _work(rows) / f"{corpus}-{seed}"
        self._base: Experiment | None = None

    def __enter__(self) -> SeedRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def rows_of(self, cells: Sequence[Cell]) -> list[str]:
        """Compute the rows of one method; return a sentence for each that could not be computed."""
        name, faults = cells[0].method, list[str]()
        shared: _Run | None = None
        for (task_name, labels), group in groupby(cells, key=lambda cell: (cell.task, cell.labels)):
            try:
                task = self.modality.task(task_name, self.seed, labels)
                experiment = self.experiment(task)
                if name == PLAIN:
                    own = _Run(title=self.modality.plain)
                elif shared is None or shared.uses_labels:
                    own = shared = self.adapt(method_of(name), experiment)
                else:
                    own = shared
                for cell in group:
                    self.write(cell, task, experiment, own)
            except MloptError as error:
                faults.append(f"{name} on {task_name}, seed {self.seed}: {error}")
                print(faults[-1], flush=True)
        return faults

    def experiment(self, task: Task) -> Experiment:
        """Return the experiment of a task: the same start, batches and scales as for the other tasks."""
        if self._base is None:
            self._base = self.modality.recipe(self.corpus, task, self.seed).experiment(1, progress=False)
        return attrs.evolve(self._base, task=task)

    def adapt(self, method: Method, experiment: Experiment) -> _Run:
        """Adapt the encoder within the budget."""
        budgeted = experiment.affordable(method, self.plan.passes)
        if method.uses_labels:
            # Rehearsals do not depend on the labels: the tasks share them, but for those of another length.
            length = min(budgeted.settings.rehearsal_steps, budgeted.steps)
            own, shared = (_ended_phases(self.folder / name) for name in (_OWN, f"{length}-steps"))
            shutil.rmtree(own.folder, ignore_errors=True)
            budgeted = attrs.evolve(budgeted, checkpoints=own, shared_checkpoints=shared, resume=True)
        method.check(budgeted.settings, budgeted.steps, budgeted.names)
        with measured(self.plan.device) as used:
            adapted = method.adapt(budgeted)
        passes = method.passes(budgeted)
        return _Run(
            title=method.title,
            uses_labels=method.uses_labels,
            adapted=adapted,
            steps=(adapted.steps or budgeted.steps) if passes else 0,
            passes=passes,
            used=used,
        )

    def write(self, cell: Cell, task: Any, experiment: Experiment, own: _Run) -> None:
        """Score an adapted encoder and append the row."""
        if own.adapted is None:
            score = plain(experiment.encoder, task, *self.modality.plain_features(task))
        elif cell.finetuning == "probe":
            score = probe(own.adapted.encoder, task)
        else:
            score = full(own.adapted.encoder, task, self.plan.settings, self.seed)
        self.rows.append(
            cell,
            modality=self.plan.modality,
            split=self.plan.split,
            title=own.title,
            metric=task.metric_name,
            greater_is_better=task.greater_is_better,
            score=score,
            **own.learned(),
            objectives=list(experiment.names),
            control=_control(experiment),
            sizes={split: len(examples) for split, examples in task.splits.items()},
            budget=self.plan.passes,
            environment=environment(self.plan.device),
        )
        print(
            f"seed {cell.seed}  {cell.method:28} {cell.task:16} {cell.labels} {cell.finetuning}: {score:.4f}",
            flush=True,
        )


@attrs.frozen(kw_only=True)
class _Run:
    """A method's adapted encoder and its cost; no encoder for plain features."""

    title: str
    uses_labels: bool = False
    adapted: Adapted | None = None
    steps: int = 0
    passes: int = 0
    used: Used = attrs.field(factory=Used)

    def learned(self) -> dict[str, Any]:
        """Return the cost, the weights with their errors, and the significant objectives as plain data."""
        adapted = self.adapted
        signals = adapted.signals if adapted else {}
        errors = {name: signal.weight_error for name, signal in signals.items()}
        return {
            "steps": self.steps,
            "passes": self.passes,
            "seconds": self.used.seconds,
            "memory": self.used.memory,
            "weights": dict(adapted.weights) if adapted and adapted.weights else None,
            "weight_errors": None if None in errors.values() else errors or None,
            "significant": {
                name: "helps" if signal.mean > 0 else "harms" for name, signal in signals.items() if signal.significant
            },
            "judged": bool(signals),
        }


#: The folder of the phases of one task.
_OWN = "task"


def _ended_phases(folder: Path) -> mlopt.Checkpoints:
    """Return checkpoints of the ends of phases only: the study resumes by rows, and a text encoder has 50 MB."""
    return mlopt.Checkpoints(folder, every=sys.maxsize, keep=1)


def _control(experiment: Experiment) -> str | None:
    """Return the name of the control among the objectives."""
    from mlopt.recipes.tapweight.control import HashedLabels

    return next((objective.name for objective in experiment.objectives if isinstance(objective, HashedLabels)), None)
