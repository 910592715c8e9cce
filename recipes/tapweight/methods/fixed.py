"""Methods that do not learn weights: no pretraining, and pretraining at given weights."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING

from mlopt.errors import ArgumentError

from .method import Adapted, Method
from .pretraining import pretraining, weighted_passes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import mlopt

    from ..experiment import Experiment
    from ..models import Pretraining
    from ..settings import Settings

__all__ = ["Direct", "Equal", "FixedWeights", "Given", "Single"]


class Direct(Method):
    """No adaptation: the encoder is finetuned as it is."""

    name, title = "direct", "direct finetuning"
    summary = "Not pretrained further."
    uses_labels = False

    def passes(self, experiment: Experiment) -> int:
        """Return 0."""
        return 0

    def phases(self, experiment: Experiment) -> tuple[int, ...]:
        """Return no phase."""
        return ()

    def adapt(self, experiment: Experiment, callbacks: Sequence[mlopt.Callback] = ()) -> Adapted:
        """Return the encoder without adaptation."""
        return Adapted(encoder=experiment.model().encoder)


class FixedWeights(Method):
    """Pretraining at weights that do not change: min sum_k w_k L_k."""

    uses_labels = False

    @abstractmethod
    def weights(self, objectives: Sequence[str]) -> dict[str, float]:
        """Return the weight of each objective; objectives of weight zero are not evaluated.

        Raises:
            ValueError: the weights do not fit the objectives.
        """

    def check(self, settings: Settings, steps: int, objectives: Sequence[str]) -> None:
        """Refuse weights that do not fit the objectives."""
        self.weights(objectives)

    def passes(self, experiment: Experiment) -> int:
        """Return one pass for each view of each objective of positive weight, at each step."""
        return experiment.pretraining_steps * weighted_passes(experiment, self.weights(experiment.names))

    def problem(self, experiment: Experiment, model: Pretraining) -> mlopt.Problem:
        """Return the pretraining as a problem of one level, which trains `model` in place."""
        return pretraining(experiment, model, self.weights(experiment.names))

    def adapt(self, experiment: Experiment, callbacks: Sequence[mlopt.Callback] = ()) -> Adapted:
        """Pretrain the encoder further."""
        model = experiment.model()
        problem, steps = self.problem(experiment, model), experiment.pretraining_steps
        solution = experiment.solve(self.name, problem, steps, callbacks=callbacks, labels=self.uses_labels)
        return Adapted(encoder=model.encoder, weights=self.weights(experiment.names), history=solution.history)


class Equal(FixedWeights):
    """Pretraining at equal weights."""

    name, title = "equal", "equal weights"
    summary = "Pretrained further with several objectives at equal weights."

    def weights(self, objectives: Sequence[str]) -> dict[str, float]:
        """Return 1 / K for each of K objectives."""
        return dict.fromkeys(objectives, 1 / len(objectives))


class Single(FixedWeights):
    """Pretraining on one objective.

    Args:
        objective: the name of the objective.
    """

    def __init__(self, objective: str) -> None:
        self.objective = objective
        self.name, self.title = f"single:{objective}", f"{objective} alone"
        self.summary = f"Pretrained further with the objective {objective} alone."

    def weights(self, objectives: Sequence[str]) -> dict[str, float]:
        """Return 1 for the objective and 0 for the others."""
        if self.objective not in objectives:
            raise ArgumentError(
                f"{self.name}: {self.objective!r} is not one of the objectives, {', '.join(objectives)}"
            )
        return {name: float(name == self.objective) for name in objectives}


class Given(FixedWeights):
    """Pretraining at given weights, such as those that an earlier run learned.

    Args:
        weights: a weight for each objective, not negative; they are divided by their sum.
        name: the key of the method in scores.

    Raises:
        ValueError: a weight is negative or not finite, or none is positive.
    """

    title = "given weights"
    # The weights may have been learned from labels.
    uses_labels = True
    summary = "Pretrained further with several objectives at given weights."

    def __init__(self, weights: Mapping[str, float], name: str = "given") -> None:
        if not all(0 <= weight < math.inf for weight in weights.values()) or not any(weights.values()):
            raise ArgumentError(
                f"{name}: weights={dict(weights)!r}; give finite numbers >= 0, at least one of them positive"
            )
        self.name = name
        total = sum(weights.values())
        self._weights = {objective: weight / total for objective, weight in weights.items()}

    def weights(self, objectives: Sequence[str]) -> dict[str, float]:
        """Return the weights in the order of the objectives."""
        if set(objectives) != set(self._weights):
            raise ArgumentError(
                f"{self.name}: weights of {', '.join(self._weights)}, but the objectives are {', '.join(objectives)}; give a "
                "weight for each"
            )
        return {name: self._weights[name] for name in objectives}
