"""TapWeight by rehearsal: the weights follow from real pretraining on each objective alone, judged by an exact head.

The three levels are those of TapWeight. The response of the inner levels to the weights is evaluated at the vertices of the
simplex, not differentiated:

pretraining   theta_k = the encoder after some real steps on L_k alone; the same start and batches for each k
finetuning    omega_k = ridge regression on the frozen features of all labelled examples, in closed form
reweighting   lambda = E_bootstrap argmin over the simplex of sum_k lambda_k (mean leave-one-out loss of omega_k)

The bracket is linear in lambda, so its minimum is a vertex: lambda_k is the share of the resamples of the labelled examples in
which objective k has the smallest loss. Strong evidence concentrates the weights, weak evidence spreads them.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import attrs
import torch

from mlopt.rng import derive_seed, seed_everything

from ..exact_head import feature_passes, labelled_features, ridge_leave_one_out
from ..models import Pretraining
from ..significance import compare, shares_of_best
from .method import Adapted, Method
from .pretraining import pretraining

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    import mlopt

    from ..experiment import Experiment
    from ..task import Split

__all__ = ["Rehearsal"]

#: The head needs no epoch to be chosen, so the labels of both splits serve the weights.
_LABELLED: tuple[Split, ...] = ("train", "valid")


class Rehearsal(Method):
    """Weights from rehearsals: each objective is tried alone before the main pretraining.

    The main pretraining then starts from the beginning, and each of its steps takes the loss of one objective, drawn with the
    probabilities lambda.
    """

    name, title = "rehearsal", "TapWeight by rehearsal"
    summary = (
        "Pretrained further with several objectives. Their weights are the shares of bootstrap resamples of the task's labelled "
        "examples in which an objective alone had the smallest leave-one-out loss."
    )

    def passes(self, experiment: Experiment) -> int:
        """Return the most passes: those of all rehearsals and their features, and a main run on the objective of most views."""
        settings, views = experiment.settings, [objective.passes for objective in experiment.objectives]
        features = len(views) * feature_passes(experiment.task, _LABELLED)
        rehearsals = settings.rehearsals * (self._length(experiment) * sum(views) + features)
        return rehearsals + experiment.pretraining_steps * max(views)

    def adapt(self, experiment: Experiment, callbacks: Sequence[mlopt.Callback] = ()) -> Adapted:
        """Rehearse each objective, choose the weights, and pretrain the encoder further."""
        losses = self.losses(experiment)
        seed = derive_seed(experiment.seed, "bootstrap")
        weights = dict(zip(experiment.names, shares_of_best(losses, seed).tolist(), strict=True))
        model = experiment.model()
        problem = pretraining(experiment, model, weights, drawn=True)
        solution = experiment.solve(self.name, problem, experiment.pretraining_steps, callbacks=callbacks)
        signals = compare(experiment.names, losses, seed)
        return Adapted(encoder=model.encoder, weights=weights, signals=signals, history=solution.history)

    def losses(self, experiment: Experiment) -> Tensor:
        """Return the leave-one-out loss of each labelled example after each objective alone, (K, n); a mean over rehearsals."""
        repeats = []
        for repeat in range(experiment.settings.rehearsals):
            start = self._start(experiment, repeat)
            arms = [self._arm(experiment, start, name, repeat) for name in experiment.names]
            repeats.append(torch.stack(arms))
        return torch.stack(repeats).mean(0)

    def _arm(self, experiment: Experiment, start: Pretraining, name: str, repeat: int) -> Tensor:
        """Pretrain a copy of `start` on one objective; return the leave-one-out loss of each labelled example, (n,)."""
        short = attrs.evolve(experiment, steps=self._length(experiment))
        model = copy.deepcopy(start)
        weights = {other: float(other == name) for other in experiment.names}
        short.solve(
            f"rehearsal-{repeat}-{name}",
            pretraining(short, model, weights),
            short.pretraining_steps,
            seed=derive_seed(experiment.seed, "rehearsal", repeat),
            labels=False,
        )
        return ridge_leave_one_out(*labelled_features(model.encoder, experiment.task, _LABELLED)).losses

    @staticmethod
    def _start(experiment: Experiment, repeat: int) -> Pretraining:
        """Return the encoder at the start; each rehearsal but the first draws heads of its own."""
        if repeat == 0:
            return experiment.model()
        seed_everything(derive_seed(experiment.seed, "rehearsal", repeat))
        model = Pretraining(copy.deepcopy(experiment.encoder), experiment.objectives).to(experiment.device)
        model.train()
        return model

    @staticmethod
    def _length(experiment: Experiment) -> int:
        """Return the steps of a rehearsal; it is never longer than the main run."""
        return min(experiment.settings.rehearsal_steps, experiment.pretraining_steps)
