"""The common ground of the methods of a run: the same start, batches, settings and number of pretraining steps."""

from __future__ import annotations

import copy
import time
from bisect import bisect_right
from typing import TYPE_CHECKING, Any, Protocol

import attrs
from torch.utils.data import DataLoader

import mlopt
from mlopt.errors import ArgumentError
from mlopt.problem import Stream
from mlopt.ranks import ALONE
from mlopt.rng import seed_everything

from .models import Pretraining, gradient_norms

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from mlopt.ranks import Ranks

    from .encoder import Encoder
    from .objective import Objective
    from .phases import Phases
    from .settings import Settings
    from .task import Task

__all__ = ["Costly", "Experiment"]

_SCALING_BATCHES = 4


class Costly(Protocol):
    """A method that states its cost."""

    name: str

    def passes(self, experiment: Experiment) -> int:
        """Return how often the encoder is evaluated on a batch."""


@attrs.define(kw_only=True, eq=False)
class Experiment:
    """The common ground of the methods that a run compares.

    Args:
        encoder: the encoder before adaptation; not changed.
        objectives: in the order of their weights.
        task: the downstream task.
        corpus: unlabelled examples.
        collate: joins unlabelled examples into a batch.
        settings: the numbers of the run.
        estimator: how methods that differentiate through finetuning pull cotangents back through it.
        seed: the seed of everything random.
        steps: pretraining steps.
        budget: the most encoder passes of a method; None if only the steps are limited.
        checkpoints: each phase is saved in a folder of its own; nothing is saved if None.
        shared_checkpoints: the same for phases that depend on the corpus only, which experiments on other tasks can read;
            `checkpoints` if None.
        resume: if True, each phase resumes from its newest checkpoint.
        phases: shows the progress of each phase; nothing is shown if None.
        ranks: the processes that share the rehearsals.
        rehearsed: the losses of the method's rehearsals, if they were made before `Method.adapt`.
    """

    encoder: Encoder
    objectives: tuple[Objective, ...]
    task: Task
    corpus: Sequence[Any]
    collate: Callable[[list[Any]], Any]
    settings: Settings
    estimator: mlopt.Estimator
    seed: int
    steps: int = 0
    budget: int | None = None
    checkpoints: mlopt.Checkpoints | None = None
    shared_checkpoints: mlopt.Checkpoints | None = None
    resume: bool = False
    phases: Phases | None = None
    ranks: Ranks = ALONE
    rehearsed: torch.Tensor | None = None
    _start: tuple[Pretraining, dict[str, float]] | None = None
    _seconds_per_pass: float = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        """The objectives' names, in the order of their weights."""
        return tuple(objective.name for objective in self.objectives)

    @property
    def views(self) -> int:
        """The evaluations of the encoder in one step of pretraining on all objectives."""
        return sum(objective.passes for objective in self.objectives)

    @property
    def device(self) -> torch.device:
        """The device of the encoder."""
        return next(self.encoder.parameters()).device

    @property
    def pretraining_steps(self) -> int:
        """The steps of pretraining: the largest multiple of `settings.every` that `steps` holds, the same for every method."""
        return self.steps // self.settings.every * self.settings.every

    def affordable(self, method: Costly, passes: int) -> Experiment:
        """Return the experiment with the largest multiple of `settings.every` steps whose cost is at most `passes`.

        Args:
            method: states its cost by `passes(experiment)`, which does not fall with the number of steps.
            passes: the most evaluations of the encoder on a batch.

        Raises:
            ArgumentError: not even the fewest steps are affordable.
        """

        every = self.settings.every

        def cost(multiple: int) -> int:
            return method.passes(attrs.evolve(self, steps=multiple * every, budget=None))

        # A step evaluates the encoder at least once, unless the method takes no steps.
        most = bisect_right(range(1, max(1, passes // every) + 1), passes, key=cost)
        if not most:
            raise ArgumentError(
                f"passes={passes}: the shortest run of {method.name} takes {cost(1):,}; give at least that many"
            )
        return attrs.evolve(self, steps=most * every, budget=passes)

    def prepare(self) -> tuple[Pretraining, dict[str, float]]:
        """Prepare the objectives on the corpus, once.

        Returns:
            The encoder and the objectives' heads at the start, and the number that each objective's loss is divided by.

        Raises:
            ValueError: an objective cannot be prepared, or gives the encoder no gradient.
        """
        if self._start is None:
            for objective in self.objectives:
                objective.prepare(self.corpus, self.seed)
            seed_everything(self.seed)
            model = Pretraining(copy.deepcopy(self.encoder), self.objectives).to(self.device)
            model.train()
            stream = self.stream("prepare")
            batches = [stream.next() for _ in range(_SCALING_BATCHES)]
            begin = time.perf_counter()
            norms = gradient_norms(model, self.objectives, batches, self.seed)
            self._seconds_per_pass = (time.perf_counter() - begin) / (_SCALING_BATCHES * self.views)
            self._start = model, norms if self.settings.scale == "gradient" else dict.fromkeys(norms, 1.0)
        return self._start

    def seconds(self, passes: int) -> float:
        """Return a rough time of some passes of pretraining, from those of `prepare`."""
        self.prepare()
        return passes * self._seconds_per_pass

    def model(self) -> Pretraining:
        """Return a new copy of the encoder and the objectives' heads at the start."""
        return copy.deepcopy(self.prepare()[0])

    @property
    def scales(self) -> dict[str, float]:
        """The number that each objective's loss is divided by."""
        return self.prepare()[1]

    def batches(self) -> DataLoader[Any]:
        """Return batches of the corpus."""
        size = min(self.settings.batch_size, len(self.corpus))
        corpus: Any = self.corpus
        return DataLoader(corpus, batch_size=size, shuffle=True, drop_last=True, collate_fn=self.collate)

    def stream(self, purpose: str) -> Stream:
        """Return batches of the corpus without end, in an order that depends on the purpose and the seed."""
        return Stream(purpose, self.batches(), self.seed, self.device)

    def solve(
        self,
        phase: str,
        problem: mlopt.Problem,
        steps: int,
        *,
        title: str | None = None,
        callbacks: Sequence[mlopt.Callback] = (),
        seed: int | None = None,
        labels: bool = True,
    ) -> mlopt.Solution:
        """Solve a problem as one phase of the run; on resume, a phase that ended is read from its last checkpoint.

        Args:
            phase: the name of the phase, and of its folder of checkpoints.
            problem: the problem.
            steps: outer steps.
            title: names the phase in the progress; "pretraining (PHASE)" when None.
            callbacks: see `mlopt.Callback`.
            seed: the seed of the experiment when None.
            labels: False if the phase does not depend on the labelled examples.
        """
        own = self.checkpoints if labels else self.shared_checkpoints or self.checkpoints
        if own is not None:
            own = attrs.evolve(own, folder=own.folder / phase.replace(":", "-"))
        shown = [] if self.phases is None else [self.phases.next(title or f"pretraining ({phase})")]
        return mlopt.solve(
            problem,
            steps,
            callbacks=[*callbacks, *shown],
            checkpoint=own,
            seed=self.seed if seed is None else seed,
            resume=self.resume,
            progress=False,
        )
