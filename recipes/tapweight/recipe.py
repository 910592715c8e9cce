"""TapWeight: adapt an encoder to a task with several objectives, finetune it, and compare methods of weighing the objectives."""

from __future__ import annotations

import statistics
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
from rich.console import Console

import mlopt
from mlopt.errors import ArgumentError
from mlopt.ranks import Ranks, alone
from mlopt.validation import require

from .agreement import require_same_run, require_that_run
from .encoder import Encoder
from .experiment import Experiment
from .methods import DEFAULT, Method, make_method
from .phases import Phases
from .plan import Plan
from .result import Outcome, TapWeightResult
from .settings import Settings
from .sharing import in_each
from .stages import adapt_all, finetune_all
from .tested import Tested, records_of

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from .finetuning import Finetuned
    from .objective import Objective
    from .task import Task

__all__ = ["TapWeight"]


class TapWeight:
    """Task-adaptive pretraining that learns the weights of its objectives.

    Three levels: pretraining, theta*(lambda) = argmin sum_k lambda_k L_k(theta); finetuning,
    omega*(theta*) = argmin L_train(omega) + gamma ||omega - theta*||^2; reweighting, min_lambda L_valid(omega*(theta*(lambda))).
    The adapted encoder is theta; a copy of it is then finetuned, and scored once.

    Args:
        encoder: the encoder; not changed.
        objectives: at least two, each with a name of its own.
        task: the downstream task.
        corpus: unlabelled examples.
        settings: the numbers of the run.
        collate: joins unlabelled examples into a batch; the task's when None.
        estimator: how cotangents are pulled back through the finetuning level. The identity needs no network pass; an estimator
            that solves with the level's Hessian, such as `mlopt.ConjugateGradient(iterations=5)`, is more accurate.
        seed: the seed of everything random.

    Raises:
        ArgumentError: the encoder is not an `Encoder`; fewer than two objectives, or two of one name; a corpus, or a split of the
            task, of fewer than two examples.

    Example:
        >>> import csv
        >>> from mlopt.recipes import TapWeight
        >>> from mlopt.recipes.tapweight.molecules import GINE, MoleculeTask, make_objective, read_corpus
        >>> from mlopt.recipes.tapweight.settings import Settings
        >>> rows = [("C" * length + end, length) for length in range(1, 13) for end in ("", "O", "N")]
        >>> with open("chains.csv", "w", newline="") as file:
        ...     csv.writer(file).writerows([("smiles", "length"), *rows])
        >>> task, corpus = MoleculeTask.from_csv("chains.csv", split="random"), read_corpus("chains.csv")
        >>> objectives = [make_objective("masked_atoms"), make_objective("contrastive")]
        >>> settings = Settings(batch_size=8, epochs=1, measurements=2)
        >>> recipe = TapWeight(GINE(width=8, layers=1), objectives, task, corpus, settings=settings)
        >>> result = recipe.fit(steps=3, progress=False)
        >>> list(result.weights), list(result.scores)
        (['masked_atoms', 'contrastive'], ['direct', 'equal', 'rehearsal'])

    Source: Zhang, Somayajula & Xie, TMLR 2025 (arXiv 2410.10006).
    """

    def __init__(
        self,
        encoder: Encoder,
        objectives: Sequence[Objective],
        task: Task,
        corpus: Sequence[Any],
        *,
        settings: Settings | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        estimator: mlopt.Estimator | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(encoder, Encoder):
            raise ArgumentError(
                f"TapWeight: encoder is a {type(encoder).__name__}; derive its class from "
                "mlopt.recipes.tapweight.encoder.Encoder"
            )
        names = [objective.name for objective in objectives]
        if len(names) < 2:
            raise ArgumentError(f"TapWeight: {len(names)} objectives are too few; give at least two")
        if len(set(names)) < len(names):
            raise ArgumentError(
                f"TapWeight: two of the objectives share a name ({', '.join(names)}); give each its own `name`"
            )
        if len(corpus) < 2:
            raise ArgumentError(f"TapWeight: the corpus holds {len(corpus)} examples; give at least two")
        for split, examples in task.splits.items():
            if len(examples) < 2:
                raise ArgumentError(f"TapWeight: the {split} split holds {len(examples)} examples; give at least two")
        self._experiment = Experiment(
            encoder=encoder,
            objectives=tuple(objectives),
            task=task,
            corpus=corpus,
            collate=collate or task.collate,
            settings=settings or Settings(),
            estimator=estimator or mlopt.Identity(),
            seed=seed,
        )

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The objectives, in the order of their weights."""
        return self._experiment.objectives

    @property
    def task(self) -> Task:
        """The downstream task."""
        return self._experiment.task

    def prepare(self) -> None:
        """Prepare the objectives on the corpus, once; `fit` does so if it has not been done."""
        self._experiment.prepare()

    def experiment(
        self,
        steps: int,
        *,
        checkpoint: mlopt.Checkpoints | str | os.PathLike[str] | None = None,
        resume: bool = False,
        progress: bool = True,
    ) -> Experiment:
        """Return the prepared experiment that all methods of a run share; see `fit` for the arguments."""
        self.prepare()
        phases = Phases() if progress else None
        if checkpoint is not None and not isinstance(checkpoint, mlopt.Checkpoints):
            checkpoint = mlopt.Checkpoints(checkpoint)
        return attrs.evolve(self._experiment, steps=steps, checkpoints=checkpoint, resume=resume, phases=phases)

    def fit(
        self,
        steps: int | None = None,
        *,
        passes: int | None = None,
        methods: Sequence[str | Method] = DEFAULT,
        callbacks: Sequence[mlopt.Callback] = (),
        checkpoint: mlopt.Checkpoints | str | os.PathLike[str] | None = None,
        resume: bool = False,
        progress: bool = True,
    ) -> TapWeightResult:
        """Adapt the encoder by each method at the same budget, finetune and score each adapted encoder.

        The processes of the default group of torch.distributed, if there is one, share the rehearsals, the methods and the
        finetunings. All return the result that one process would return.

        Args:
            steps: pretraining steps, the same for every method; or
            passes: evaluations of the encoder on a batch, the same for every method: each takes the most steps that it can.
            methods: the methods to compare, by name or as `Method` objects. The last one is the main method: the result holds its
                encoder, its finetuned models, its weights and its history. It adapts the encoder first.
            callbacks: see `mlopt.Callback`; called while the main method adapts the encoder, in the first process.
            checkpoint: a folder in which each phase of the run is saved, in a folder of its own, or
                `mlopt.Checkpoints(folder, every=...)`.
            resume: if True, read the phases that ended from the folder, and continue the others from their newest checkpoint.
                Everything but the methods must be as in the run that is resumed.
            progress: if True, print the cost first, and show the progress of each phase, see `mlopt.ProgressDisplay`.

        Returns:
            The scores of each method; and of the main method the weights and their significance, the history, and the encoder.

        Raises:
            ValueError: both steps and passes, or neither; too few of them; an unknown method, no method or one given twice; an
                objective that gives the encoder no gradient.
            CheckpointError: the folder is that of another run.
        """
        ranks = Ranks.of_work("TapWeight.fit")
        compared = _methods(methods)
        options = {"checkpoint": checkpoint, "resume": resume, "progress": progress and ranks.first}
        with alone():
            experiments = self._begun(ranks, compared, steps, passes, **options)
            finetunings = self._finetunings(compared)
            main = compared[-1]
            if (saved := experiments[main.name].checkpoints) is not None:
                ranks.by_first(partial(require_that_run, saved.folder, experiments[main.name], resume=resume))
            if (phases := experiments[main.name].phases) is not None:
                _show(Plan.of(experiments, compared, finetunings), phases, ranks.size)
            adapted = adapt_all(ranks, compared, experiments, callbacks)
            finetuned = finetune_all(ranks, compared, experiments, adapted, finetunings)
        count = self._experiment.settings.finetunings
        outcomes = {
            method.name: Outcome(
                title=method.title,
                summary=method.summary,
                passes=method.passes(experiments[method.name]),
                weights=adapted[method.name].weights,
                scores=_mean(finetuned[method.name][:count]),
                measures=_mean_measures(finetuned[method.name][:count]),
            )
            for method in compared
        }
        own, experiment = adapted[main.name], experiments[main.name]
        models = [run.model for run in finetuned[main.name][: experiment.settings.ensemble]]
        predictor = self.task.predictor([(model.encoder, model.head) for model in models])
        return TapWeightResult(
            outcomes=outcomes,
            signals=dict(own.signals),
            history=own.history,
            encoder=own.encoder,
            finetuned=finetuned[main.name],
            predictor=predictor,
            tested=None if predictor is None else Tested.of(predictor, self.task),
            splits=records_of(self.task),
            metric=self.task.metric_name,
            greater_is_better=self.task.greater_is_better,
            settings=attrs.asdict(experiment.settings),
            steps=own.steps or experiment.steps,
            seed=experiment.seed,
            estimator=str(experiment.estimator),
            data={"task": repr(self.task), "corpus": _described(experiment.corpus)},
        )

    def check(
        self, steps: int | None = None, *, passes: int | None = None, methods: Sequence[str | Method] = DEFAULT
    ) -> None:
        """Raise what `fit` raises with these arguments before it trains anything; all processes call this.

        Args:
            steps: see `fit`.
            passes: see `fit`.
            methods: see `fit`.

        Raises:
            ValueError: as `fit`.
        """
        ranks = Ranks.of_work("TapWeight.check")
        with alone():
            self._begun(ranks, _methods(methods), steps, passes)

    def plan(
        self, steps: int | None = None, *, passes: int | None = None, methods: Sequence[str | Method] = DEFAULT
    ) -> Plan:
        """Return what `fit` will do with these arguments, and its cost, without training anything.

        Times are estimated from a few steps, which are taken on copies.

        Args:
            steps: see `fit`.
            passes: see `fit`.
            methods: see `fit`.

        Raises:
            ValueError: as `fit`.
        """
        compared = _methods(methods)
        return Plan.of(self._experiments(compared, steps, passes), compared, self._finetunings(compared))

    def _begun(
        self, ranks: Ranks, methods: Sequence[Method], steps: int | None, passes: int | None, **options: Any
    ) -> dict[str, Experiment]:
        """Return the experiment of each method, the same in all processes."""
        experiments = in_each(ranks, partial(self._experiments, methods, steps, passes, **options))
        require_same_run(ranks, experiments[methods[-1].name], [method.name for method in methods])
        return experiments

    def _finetunings(self, methods: Sequence[Method]) -> dict[str, int]:
        """Return how often each method's encoder is finetuned; the ensemble is of the last, which is the main one."""
        settings = self._experiment.settings
        counts = {method.name: settings.finetunings for method in methods}
        return counts | {methods[-1].name: max(settings.finetunings, settings.ensemble)}

    def _experiments(
        self, methods: Sequence[Method], steps: int | None, passes: int | None, **options: Any
    ) -> dict[str, Experiment]:
        """Return the experiment of each method: with the same steps for all, or with those that it can afford.

        Raises:
            ValueError: both steps and passes, or neither; too few of them; a method refuses the run.
        """
        if (steps is None) == (passes is None):
            raise ArgumentError(f"fit: steps={steps} and passes={passes}; give one of them")
        settings = self._experiment.settings
        least = settings.every if steps is None else steps
        settings.schedule(least)
        for method in methods:
            method.check(settings, least, self._experiment.names)
        whole = self.experiment(least, **options)
        return {method.name: whole if passes is None else whole.affordable(method, passes) for method in methods}


def _methods(named: Sequence[str | Method]) -> tuple[Method, ...]:
    """Return the methods as objects.

    Raises:
        ArgumentError: an entry is not a method, a name is unknown, there is no method, or two have one name.
    """
    valid = not isinstance(named, str) and all(isinstance(method, (str, Method)) for method in named)
    require("fit", "methods", named, valid, "a sequence of names or Method objects, such as ['direct', 'tapweight']")
    methods = tuple(make_method(method) if isinstance(method, str) else method for method in named)
    names = [method.name for method in methods]
    if not names or len(set(names)) < len(names):
        raise ArgumentError(f"fit: methods={names!r}; give at least one, and none twice")
    return methods


def _show(plan: Plan, phases: Phases, processes: int) -> None:
    """Print the cost of a run; let its phases be numbered, unless each of several processes has its own."""
    shared = f" {processes} processes share the phases, so the run takes less time." if processes > 1 else ""
    Console().print(f"{plan}{shared}", highlight=False, soft_wrap=True)
    if processes == 1:
        phases.total = len(plan.whole.phases)


def _mean(finetuned: Sequence[Finetuned]) -> dict[str, float]:
    """Return the mean valid and test scores of several finetunings."""
    return {split: statistics.fmean(getattr(run.score, split) for run in finetuned) for split in ("valid", "test")}


def _mean_measures(finetuned: Sequence[Finetuned]) -> dict[str, dict[str, float]]:
    """Return the mean of every metric on the test split over several finetunings, by task and by name."""
    return {
        task: {name: statistics.fmean(run.measures[task][name] for run in finetuned) for name in measures}
        for task, measures in finetuned[0].measures.items()
    }


def _described(corpus: Sequence[Any]) -> str:
    """Return a corpus's own summary if it has one, else its size."""
    return str(corpus.summary()) if hasattr(corpus, "summary") else f"{len(corpus)} examples"
