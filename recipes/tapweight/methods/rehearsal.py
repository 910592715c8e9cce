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

from typing import TYPE_CHECKING

import attrs

from mlopt.rng import derive_seed

from ..significance import compare, shares_of_best
from .method import Adapted, Method
from .rehearsing import main_run, rehearsal_passes, rehearse, run_passes, run_phases

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    import mlopt

    from ..experiment import Experiment
    from ..significance import Signal

__all__ = ["Rehearsal"]


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
        return run_passes(experiment, self.rehearsals(experiment))

    def phases(self, experiment: Experiment) -> tuple[int, ...]:
        """Return the steps of each rehearsal, and those of the main run."""
        return run_phases(experiment, len(experiment.names))

    def rehearse(self, experiment: Experiment) -> Tensor:
        """Return the losses of the labelled examples after pretraining on each objective alone, (K, n)."""
        names = experiment.names
        return rehearse(experiment, {name: {other: float(other == name) for other in names} for name in names})

    def adapt(self, experiment: Experiment, callbacks: Sequence[mlopt.Callback] = ()) -> Adapted:
        """Rehearse each objective, choose the weights, and pretrain the encoder further."""
        weights, signals = self.weigh(experiment)
        adapted = main_run(experiment, self.name, weights, self.rehearsals(experiment), callbacks)
        return attrs.evolve(adapted, signals=signals)

    def weigh(self, experiment: Experiment) -> tuple[dict[str, float], dict[str, Signal]]:
        """Rehearse each objective; return the weight of each, and how it compares with the average of all."""
        names, losses = experiment.names, experiment.rehearsed
        losses = self.rehearse(experiment) if losses is None else losses
        seed = derive_seed(experiment.seed, "bootstrap")
        return dict(zip(names, shares_of_best(losses, seed).tolist(), strict=True)), compare(names, losses, seed)

    @staticmethod
    def rehearsals(experiment: Experiment) -> int:
        """Return the passes of all rehearsals."""
        return rehearsal_passes(experiment, [objective.passes for objective in experiment.objectives])
