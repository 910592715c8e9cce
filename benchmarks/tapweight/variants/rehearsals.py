"""Variants of the step from rehearsals to an adapted encoder: another main run, several rounds, or the gradient form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

import mlopt
from mlopt.recipes.tapweight.experiment import Experiment
from mlopt.recipes.tapweight.methods import Adapted, Given, Rehearsal, ThreeLevels
from mlopt.recipes.tapweight.methods.pretraining import drawn_passes, pretraining, weighted_passes
from mlopt.recipes.tapweight.methods.rehearsing import main_run, rehearse
from mlopt.recipes.tapweight.models import Pretraining
from mlopt.recipes.tapweight.significance import shares_of_best
from mlopt.rng import derive_seed

__all__ = ["ByVerdict", "FromRehearsal", "Sequential", "WeightedSum"]

#: An objective of a smaller weight would cost a pass of each step and hardly move the encoder.
_LEAST_WEIGHT = 0.01


class WeightedSum(Rehearsal):
    """The main run takes the weighted sum of all losses at each step, in place of one loss that is drawn.

    A step costs a pass for each view, so a budget pays fewer steps. Objectives of a weight below 0.01 are left out.
    """

    name, title = "rehearsal-sum", "rehearsal, weighted sum"

    def adapt(self, experiment: Experiment, callbacks: Sequence[mlopt.Callback] = ()) -> Adapted:
        """Rehearse each objective, choose the weights, and pretrain on the weighted sum."""
        weights, signals = self.weigh(experiment)
        kept = Given({name: weight if weight >= _LEAST_WEIGHT else 0.0 for name, weight in weights.items()}, self.name)
        settings = attrs.evolve(experiment.settings, every=1)
        steps = _rest(experiment) // weighted_passes(experiment, kept.weights(experiment.names))
        adapted = kept.adapt(attrs.evolve(experiment, steps=steps, settings=settings), callbacks)
        return attrs.evolve(adapted, signals=signals, steps=steps)


class ByVerdict(Rehearsal):
    """Equal weights where no objective is significant: the weights are then chance."""

    name, title = "rehearsal-verdict", "rehearsal, equal unless significant"

    def adapt(self, experiment: Experiment, callbacks: Sequence[mlopt.Callback] = ()) -> Adapted:
        """Rehearse each objective, and pretrain at the weights if the verdict supports them, else at equal weights."""
        weights, signals = self.weigh(experiment)
        if not any(signal.significant for signal in signals.values()):
            weights = dict.fromkeys(weights, 1 / len(weights))
        adapted = main_run(experiment, self.name, weights, self.rehearsals(experiment), callbacks)
        return attrs.evolve(adapted, signals=signals)


class Sequential(Rehearsal):
    """Two rounds: rehearse, pretrain for half of the steps, rehearse from the adapted encoder, pretrain for the rest.

    Each round rehearses an objective half as often, so that both cost what one round costs. The weights are those of the
    second round.
    """

    name, title = "rehearsal-sequential", "rehearsal in two rounds"

    def adapt(self, experiment: Experiment, callbacks: Sequence[mlopt.Callback] = ()) -> Adapted:
        """Rehearse and pretrain, twice."""
        settings = attrs.evolve(experiment.settings, rehearsals=max(1, experiment.settings.rehearsals // 2), every=1)
        own = attrs.evolve(experiment, settings=settings)
        first = self._weights(own, "")
        steps = own.pretraining_steps // 2
        model = self._pretrain(own, "first", own.model(), first, steps, callbacks)
        # From here on everything depends on the labels of the task.
        later = attrs.evolve(
            own,
            start=(model, own.scales),
            encoder=model.encoder,
            seed=derive_seed(own.seed, "second round"),
            shared_checkpoints=None,
        )
        second = self._weights(later, "second-")
        rest = int((_rest(experiment) - steps * drawn_passes(own, first)) / drawn_passes(own, second))
        model = self._pretrain(later, "second", later.model(), second, rest, callbacks)
        return Adapted(encoder=model.encoder, weights=second, steps=steps + rest)

    @staticmethod
    def _weights(experiment: Experiment, prefix: str) -> dict[str, float]:
        names = experiment.names
        alone = {f"{prefix}{name}": {other: float(other == name) for other in names} for name in names}
        shares = shares_of_best(rehearse(experiment, alone), derive_seed(experiment.seed, "bootstrap"))
        return dict(zip(names, shares.tolist(), strict=True))

    def _pretrain(
        self,
        experiment: Experiment,
        phase: str,
        model: Pretraining,
        weights: Mapping[str, float],
        steps: int,
        callbacks: Sequence[mlopt.Callback],
    ) -> Pretraining:
        own = attrs.evolve(experiment, steps=steps)
        own.solve(f"{self.name}-{phase}", pretraining(own, model, weights, drawn=True), steps, callbacks=callbacks)
        return model


class FromRehearsal(ThreeLevels):
    """The published form, whose weights start at those of the rehearsals in place of equal weights."""

    def __init__(self) -> None:
        super().__init__(name="rehearsal-gradient")
        self.title = "published form from the rehearsals' weights"

    def passes(self, experiment: Experiment) -> int:
        """Return the passes of the rehearsals and of the three levels."""
        return Rehearsal.rehearsals(experiment) + super().passes(experiment)

    def adapt(self, experiment: Experiment, callbacks: Sequence[mlopt.Callback] = ()) -> Adapted:
        """Rehearse each objective, then learn the weights from there on."""
        weights, _ = Rehearsal().weigh(experiment)
        return _Started(self.name, weights).adapt(experiment, callbacks)


class _Started(ThreeLevels):
    """The three levels from given weights; a weight below 0.01 starts at 0.01, or it could hardly grow."""

    def __init__(self, name: str, weights: Mapping[str, float]) -> None:
        super().__init__(name=name)
        self.weights = weights

    def problem(self, experiment: Experiment, model: Pretraining) -> mlopt.Problem:
        """Return the three levels with these weights."""
        problem = super().problem(experiment, model)
        logits = problem["reweighting"].module.logits.data
        logits.copy_(
            logits.new_tensor([self.weights[name] for name in experiment.names]).clamp(min=_LEAST_WEIGHT).log()
        )
        return problem


def _rest(experiment: Experiment) -> int:
    """Return the passes that the rehearsals leave of the budget, which a study always has."""
    assert experiment.budget is not None
    return experiment.budget - Rehearsal.rehearsals(experiment)
