"""Rehearsals: short pretraining at candidate weights from one start, each judged by an exact head on the labelled examples."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import TYPE_CHECKING

import attrs
import torch

from mlopt.errors import NonFiniteError
from mlopt.rng import derive_seed, seed_everything

from ..exact_head import feature_passes, labelled_features, labelled_groups, ridge_leave_one_out
from ..models import Pretraining
from ..sharing import shared
from .method import Adapted
from .pretraining import drawn_passes, pretraining

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    import mlopt

    from ..experiment import Experiment
    from ..task import Split

__all__ = ["main_run", "rehearsal_passes", "rehearse", "run_passes", "run_phases"]

#: The head needs no epoch to be chosen, so the labels of both splits serve the weights.
_LABELLED: tuple[Split, ...] = ("train", "valid")
#: Weights sum to one but for rounding, and a budget that pays a whole number of steps pays all of them.
_ROUNDING = 1e-6


def rehearse(experiment: Experiment, candidates: Mapping[str, Mapping[str, float]]) -> Tensor:
    """Return the leave-one-out loss of each labelled example after pretraining at each candidate, (C, n).

    An example that is listed more than once is one of the n: it is left out, and drawn by the bootstrap, with all of its rows.
    All candidates have the same start and batches. The losses are means over the rehearsals of the settings, each of which has
    batches and heads of its own. Several processes share the rehearsals.

    Args:
        experiment: the start, the batches and the settings.
        candidates: weights of the objectives, which sum to one, by the name of the candidate. A step takes the loss of one
            objective, drawn by these weights.

    Raises:
        NonFiniteError: a rehearsal diverges, or a loss is not finite: there is nothing to choose weights by.
    """
    groups = labelled_groups(experiment.task, _LABELLED)
    repeats = range(experiment.settings.rehearsals)
    rehearsals = [(repeat, name) for repeat in repeats for name in candidates]
    tasks, costs = [], []
    for number, (repeat, name) in enumerate(rehearsals, 1):
        title = f"rehearsal {number} of {len(rehearsals)} ({name})"
        tasks.append(partial(_loss, experiment, groups, repeat, name, candidates[name], title))
        costs.append(drawn_passes(experiment, candidates[name]))
    losses = torch.stack(shared(experiment.ranks, tasks, costs, saved=experiment.checkpoints is not None))
    return losses.reshape(len(repeats), len(candidates), -1).mean(0)


def rehearsal_passes(experiment: Experiment, views: Sequence[float]) -> int:
    """Return the passes of `rehearse` for candidates whose steps take these numbers of passes, features included."""
    features = len(views) * feature_passes(experiment.task, _LABELLED)
    return experiment.settings.rehearsals * (round(_length(experiment) * sum(views)) + features)


def run_passes(experiment: Experiment, rehearsals: int) -> int:
    """Return the most passes of rehearsals of these passes and a main run; `main_run` spends the rest of a budget."""
    most = max(objective.passes for objective in experiment.objectives)
    return max(rehearsals + experiment.pretraining_steps * most, experiment.budget or 0)


def run_phases(experiment: Experiment, candidates: int) -> tuple[int, ...]:
    """Return the steps of each rehearsal of some candidates, and those of the main run; the rest of a budget may add to these."""
    rehearsals = experiment.settings.rehearsals * candidates
    return (*[_length(experiment)] * rehearsals, experiment.pretraining_steps)


def main_run(
    experiment: Experiment,
    phase: str,
    weights: Mapping[str, float],
    rehearsals: int,
    callbacks: Sequence[mlopt.Callback],
) -> Adapted:
    """Pretrain the encoder from the start; each step takes the loss of one objective, drawn by the weights.

    A budget is planned for the objective of the most passes a step. At the learned weights a step may take fewer; the main run
    then takes as many more steps.

    Args:
        experiment: the experiment of the method.
        phase: the name of the phase.
        weights: the learned weights.
        rehearsals: the passes of all rehearsals.
        callbacks: see `mlopt.Callback`.
    """
    steps = experiment.pretraining_steps
    if experiment.budget is not None:
        steps = math.floor((experiment.budget - rehearsals) / drawn_passes(experiment, weights) + _ROUNDING)
    # No weights move in the main run, so its length need not be a multiple of `every`.
    experiment = attrs.evolve(experiment, steps=steps, settings=attrs.evolve(experiment.settings, every=1))
    model = experiment.model()
    problem = pretraining(experiment, model, weights, drawn=True)
    solution = experiment.solve(phase, problem, steps, callbacks=callbacks)
    return Adapted(encoder=model.encoder, weights=weights, history=solution.history, steps=steps)


def _loss(
    experiment: Experiment, groups: Tensor, repeat: int, name: str, weights: Mapping[str, float], title: str
) -> Tensor:
    """Pretrain the encoder at the weights; return the leave-one-out loss of each labelled example, (n,)."""
    # No weights move in a rehearsal, so its length need not be a multiple of `every`.
    settings = attrs.evolve(experiment.settings, every=1)
    short = attrs.evolve(experiment, steps=_length(experiment), settings=settings)
    model = _start(experiment, repeat)
    remedy = "lower pretraining_lr, or leave the objective out"
    try:
        short.solve(
            f"rehearsal-{repeat}-{name}",
            pretraining(short, model, weights, drawn=True),
            short.pretraining_steps,
            title=title,
            seed=derive_seed(experiment.seed, "rehearsal", repeat),
            labels=False,
        )
    except NonFiniteError as error:
        raise NonFiniteError(f"rehearsal of {name!r}: {error}; {remedy}", step=error.step) from error
    features, targets = labelled_features(model.encoder, experiment.task, _LABELLED)
    if not features.isfinite().all():
        raise NonFiniteError(
            f"rehearsal of {name!r}: the encoder's features of the labelled examples are not finite; {remedy}"
        )
    losses = ridge_leave_one_out(features, targets, groups).losses
    if not losses.isfinite().all():
        raise NonFiniteError(
            f"rehearsal of {name!r}: the losses of the labelled examples are not finite; give finite labels"
        )
    return losses


def _start(experiment: Experiment, repeat: int) -> Pretraining:
    """Return the encoder at the start; each rehearsal but the first draws heads of its own."""
    if repeat == 0:
        return experiment.model()
    seed_everything(derive_seed(experiment.seed, "rehearsal", repeat))
    model = Pretraining(copy.deepcopy(experiment.encoder), experiment.objectives).to(experiment.device)
    model.train()
    return model


def _length(experiment: Experiment) -> int:
    """Return the steps of a rehearsal; it is never longer than the main run."""
    return min(experiment.settings.rehearsal_steps, experiment.pretraining_steps)
