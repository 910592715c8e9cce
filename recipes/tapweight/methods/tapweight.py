"""TapWeight as a method: the weights of the objectives are learned from the task's validation loss, by three levels."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import mlopt
from mlopt.errors import ArgumentError
from mlopt.problem import Stream
from mlopt.rng import derive_seed, seed_everything
from mlopt.validation import require

from .levels import three_levels
from .method import Adapted, Method
from .proximal import DISTANCES
from .signals import SignalMeter
from .weights import DelayedAdam

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..experiment import Experiment
    from ..models import Pretraining

__all__ = ["ThreeLevels"]

_LARGEST_HALF = 1_000


class ThreeLevels(Method):
    """Weights that are learned together with the encoder.

    Args:
        estimator: how cotangents are pulled back through finetuning. When None, the experiment's; for the coupling "l1",
            `mlopt.FiniteDifference()`.
        proximal: the coupling of the two encoders: "l2", gamma ||omega - theta||^2, or "l1", gamma ||omega - theta||_1. The mixed
            derivative of "l1" is zero almost everywhere, so only finite differences that cross a kink move the weights.
        name: the key of the method in scores; tables show it unless it is the default.

    Raises:
        ArgumentError: there is no such coupling, or no derivative passes through it.

    Source: Zhang, Somayajula & Xie, TMLR 2025 (arXiv 2410.10006).
    """

    title = "TapWeight as published"
    summary = (
        "Pretrained further with several objectives, whose weights were learned from the validation loss of a task (Zhang, "
        "Somayajula & Xie, TMLR 2025, arXiv 2410.10006)."
    )

    def __init__(
        self, estimator: mlopt.Estimator | None = None, *, proximal: str = "l2", name: str = "tapweight"
    ) -> None:
        if proximal == "none":
            raise ArgumentError(
                "ThreeLevels: proximal='none'; without a coupling the finetuned encoder does not depend on the pretrained one, "
                "so no derivative reaches the weights; give 'l2' or 'l1', or compare with Equal()"
            )
        require("ThreeLevels", "proximal", proximal, proximal in DISTANCES, f"one of {', '.join(map(repr, DISTANCES))}")
        if proximal == "l1":
            estimator = estimator or mlopt.FiniteDifference()
            if getattr(estimator, "products", None) != "finite_difference":
                raise ArgumentError(
                    f"ThreeLevels: estimator={estimator} with proximal='l1', whose mixed derivative is zero almost everywhere, "
                    "so the weights would not move; give mlopt.FiniteDifference(), or proximal='l2'"
                )
        self.estimator, self.proximal, self.name = estimator, proximal, name
        if name != "tapweight":
            self.title = f"{self.title} ({name})"

    def passes(self, experiment: Experiment) -> int:
        """Return the passes of pretraining, finetuning, validation and measurements; those inside a linear solver come on top."""
        settings = experiment.settings
        outer, delay = settings.schedule(experiment.steps)
        views = experiment.views
        # The first outer step has no cotangent of an earlier step, and evaluates the objectives once more.
        steps = outer * (settings.every * views + 2) + views
        half = min(len(experiment.task.splits["valid"]) // 2, _LARGEST_HALF)
        chunks = -(-half // settings.valid_batch_size)
        measurements = (outer - delay) // self._interval(experiment)
        # Each chunk is evaluated again in the backward pass.
        return steps + measurements * 2 * (views + 2 * chunks)

    def phases(self, experiment: Experiment) -> tuple[int, ...]:
        """Return the outer steps, each of which moves the weights."""
        return experiment.settings.schedule(experiment.steps)[:1]

    def problem(self, experiment: Experiment, model: Pretraining) -> mlopt.Problem:
        """Return the three levels, which train `model` in place."""
        settings, task = experiment.settings, experiment.task
        scales = experiment.scales
        outer, delay = settings.schedule(experiment.steps)
        # The task's head is drawn here, from the seed of the experiment, whatever was drawn before.
        seed_everything(derive_seed(experiment.seed, "finetuning"))
        return three_levels(
            model,
            experiment.objectives,
            task,
            scales=scales,
            gamma=settings.gamma,
            proximal=self.proximal,
            corpus=experiment.batches(),
            train=task.loader("train", settings.task_batch_size, shuffle=True),
            valid=task.loader("valid", settings.valid_batch_size, shuffle=True),
            optimizers={
                "pretraining": settings.adam(settings.pretraining_lr),
                "finetuning": settings.adam(settings.finetuning_lr),
                "reweighting": partial(DelayedAdam, lr=settings.weights_lr, delay=delay),
            },
            schedulers={
                "pretraining": settings.scheduler(experiment.pretraining_steps),
                "finetuning": settings.scheduler(outer),
            },
            every=settings.every,
            precision=settings.autocast,
            estimator=self.estimator or experiment.estimator,
        )

    def meter(self, experiment: Experiment) -> SignalMeter:
        """Return the callback that measures the objectives' signals."""
        settings, task, seed = experiment.settings, experiment.task, experiment.seed
        train = Stream("train", task.loader("train", settings.task_batch_size, shuffle=True), seed, experiment.device)
        return SignalMeter(
            experiment.names,
            task.splits["valid"],
            task.keys("valid"),
            task.collate,
            {"pretraining": experiment.stream("measure"), "finetuning": train},
            start=settings.schedule(experiment.steps)[1],
            interval=self._interval(experiment),
            limit=_LARGEST_HALF,
            batch_size=settings.valid_batch_size,
            seed=derive_seed(seed, "halves"),
        )

    def adapt(self, experiment: Experiment, callbacks: Sequence[mlopt.Callback] = ()) -> Adapted:
        """Pretrain the encoder further and learn the weights."""
        model = experiment.model()
        problem, meter = self.problem(experiment, model), self.meter(experiment)
        outer, _ = experiment.settings.schedule(experiment.steps)
        solution = experiment.solve(self.name, problem, outer, callbacks=[meter, *callbacks])
        weights = problem["reweighting"].module().tolist()
        return Adapted(
            encoder=model.encoder,
            weights=dict(zip(experiment.names, weights, strict=True)),
            signals=meter.signals(),
            history=solution.history,
        )

    @staticmethod
    def _interval(experiment: Experiment) -> int:
        """Return the outer steps from one measurement of the signals to the next."""
        outer, delay = experiment.settings.schedule(experiment.steps)
        return max(1, (outer - delay) // experiment.settings.measurements)
