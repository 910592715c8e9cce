"""Variants of what is rehearsed: fewer and fewer objectives for longer, or mixtures of them with a model of the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

import mlopt
from mlopt.recipes.tapweight.exact_head import ridge_fit, ridge_leave_one_out
from mlopt.recipes.tapweight.experiment import Experiment
from mlopt.recipes.tapweight.methods import Adapted, Method
from mlopt.recipes.tapweight.methods.pretraining import drawn_passes
from mlopt.recipes.tapweight.methods.rehearsing import main_run, rehearsal_passes, rehearse, run_passes
from mlopt.recipes.tapweight.significance import resampled_means, shares_of_best
from mlopt.rng import derive_seed

__all__ = ["Halving", "Mixtures", "best_mixture"]

#: Of each round: the length, and the number of rehearsals of an objective, relative to the settings; the share of the objectives.
_ROUNDS = ((0.5, 0.5, 1.0), (1.0, 0.5, 0.5), (2.0, 1.0, 0.25))


class Halving(Method):
    """Successive halving: the half of the objectives with the larger losses is left out after each of two short rounds.

    With rehearsals of m steps, R times each, the rounds take m / 2 steps R / 2 times for all objectives, m steps R / 2 times
    for half of them, and 2 m steps R times for a quarter: together as much as rehearsing all of them for m steps R times. The
    weights are the shares of the bootstrap among the last.

    Source: Jamieson & Talwalkar, AISTATS 2016, with rehearsals that start again in each round.
    """

    name, title = "rehearsal-halving", "rehearsal with successive halving"
    summary = "Pretrained further with several objectives, at weights from rehearsals with successive halving."

    def passes(self, experiment: Experiment) -> int:
        """Return the most passes: in each round the objectives of the most views are left."""
        views = sorted((objective.passes for objective in experiment.objectives), reverse=True)
        rounds = [_round(experiment, number) for number in range(len(_ROUNDS))]
        return run_passes(experiment, sum(rehearsal_passes(own, views[:count]) for own, count in rounds))

    def adapt(self, experiment: Experiment, callbacks: Sequence[mlopt.Callback] = ()) -> Adapted:
        """Rehearse in rounds, choose the weights among the last objectives, and pretrain the encoder further."""
        left, passes, losses = experiment.names, 0, torch.empty(0)
        for number in range(len(_ROUNDS)):
            own, count = _round(experiment, number)
            if number:
                order = losses.mean(1).argsort().tolist()
                left = tuple(left[place] for place in order[:count])
            # Rounds of other lengths are other phases.
            length = own.settings.rehearsal_steps
            candidates = {f"{length}-{name}": _alone(experiment, name) for name in left}
            losses = rehearse(own, candidates)
            passes += rehearsal_passes(own, [drawn_passes(own, weights) for weights in candidates.values()])
        shares = shares_of_best(losses, derive_seed(experiment.seed, "bootstrap")).tolist()
        weights = dict.fromkeys(experiment.names, 0.0) | dict(zip(left, shares, strict=True))
        return main_run(experiment, self.name, weights, passes, callbacks)


def _round(experiment: Experiment, number: int) -> tuple[Experiment, int]:
    """Return the experiment of a round and its number of objectives."""
    length, times, share = _ROUNDS[number]
    settings = experiment.settings
    own = attrs.evolve(
        settings,
        rehearsal_steps=min(max(1, round(length * settings.rehearsal_steps)), max(1, experiment.pretraining_steps)),
        rehearsals=max(1, round(times * settings.rehearsals)),
    )
    return attrs.evolve(experiment, settings=own), -(-len(experiment.names) // round(1 / share))


class Mixtures(Method):
    """Rehearse K random mixtures beside the K objectives alone; the weights minimise a model of the loss over the simplex.

    The model is a ridge regression of the loss on sqrt(lambda), see `best_mixture`. It is fitted to each bootstrap resample of
    the labelled examples, and the weights are the mean of its minima. An arm is rehearsed half as often as those of
    `Rehearsal`, so that twice as many cost the same.
    """

    name, title = "rehearsal-mixtures", "rehearsal of mixtures"
    summary = "Pretrained further with several objectives, at weights that minimise a model of the loss of rehearsed mixtures."

    def passes(self, experiment: Experiment) -> int:
        """Return the passes of all rehearsals, expected at their weights, and the most passes of the main run."""
        return run_passes(experiment, self.rehearsals(experiment))

    def adapt(self, experiment: Experiment, callbacks: Sequence[mlopt.Callback] = ()) -> Adapted:
        """Rehearse objectives and mixtures, minimise the model, and pretrain the encoder further."""
        arms = _arms(experiment)
        losses = rehearse(_half_as_often(experiment), arms)
        points = torch.tensor([[*weights.values()] for weights in arms.values()], dtype=torch.float64)
        mixture = best_mixture(points, resampled_means(losses, derive_seed(experiment.seed, "bootstrap")))
        weights = dict(zip(experiment.names, mixture.tolist(), strict=True))
        return main_run(experiment, self.name, weights, self.rehearsals(experiment), callbacks)

    @staticmethod
    def rehearsals(experiment: Experiment) -> int:
        """Return the passes of all rehearsals, expected at their weights."""
        passes = [drawn_passes(experiment, weights) for weights in _arms(experiment).values()]
        return rehearsal_passes(_half_as_often(experiment), passes)


def best_mixture(points: Tensor, losses: Tensor) -> Tensor:
    """Return the mean, over resamples, of the weights that minimise a ridge regression of the loss on sqrt(lambda), (K,).

    With the fit c + sum_k b_k sqrt(lambda_k), the minimum over the simplex is lambda_k = min(b_k, 0)^2 / sum_j min(b_j, 0)^2,
    and the vertex of the smallest b_k where none is negative. The penalty is the one with the least leave-one-out loss.

    Args:
        points: lambda of each of C arms, (C, K).
        losses: of each arm in each of R resamples, (R, C).
    """
    roots, targets = points.sqrt(), losses.T.double()
    penalty = ridge_leave_one_out(roots, targets.mean(1, keepdim=True)).penalty
    predict = ridge_fit(roots, targets, penalty, clip=False)
    corners = torch.eye(points.shape[1], dtype=torch.float64)
    slopes = predict(corners) - predict(torch.zeros_like(corners[:1]))
    shares = slopes.clamp(max=0).square()
    # Without a slope that lowers the loss, the least of them.
    vertex = (slopes == slopes.amin(0)).double()
    shares = torch.where(shares.sum(0) > 0, shares, vertex)
    return (shares / shares.sum(0)).mean(1)


def _half_as_often(experiment: Experiment) -> Experiment:
    settings = attrs.evolve(experiment.settings, rehearsals=max(1, experiment.settings.rehearsals // 2))
    return attrs.evolve(experiment, settings=settings)


def _arms(experiment: Experiment) -> dict[str, Mapping[str, float]]:
    """Return the weights of each objective alone, and of as many mixtures, which are uniform on the simplex."""
    names = experiment.names
    draws = torch.Generator().manual_seed(derive_seed(experiment.seed, "mixtures"))
    points = -torch.rand(len(names), len(names), dtype=torch.float64, generator=draws).log()
    mixed = (points / points.sum(1, keepdim=True)).tolist()
    return {
        **{name: _alone(experiment, name) for name in names},
        **{f"mixture-{k}": dict(zip(names, row, strict=True)) for k, row in enumerate(mixed)},
    }


def _alone(experiment: Experiment, name: str) -> dict[str, float]:
    return {other: float(other == name) for other in experiment.names}
