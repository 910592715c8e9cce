"""Random search: rehearse at random weights, and pretrain at the best of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mlopt.rng import derive_seed

from .method import Adapted, Method
from .pretraining import drawn_passes
from .rehearsing import main_run, rehearsal_passes, rehearse, run_passes, run_phases

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    import mlopt

    from ..experiment import Experiment

__all__ = ["RandomSearch"]


class RandomSearch(Method):
    """As many random weights as there are objectives are rehearsed; the main pretraining takes those of the smallest loss.

    The weights are uniform on the simplex. Rehearsals, their judgement and the main pretraining are those of `Rehearsal`.

    Source: Bergstra & Bengio, "Random search for hyper-parameter optimization", JMLR 2012.
    """

    name, title = "random_search", "random search"
    summary = (
        "Pretrained further with several objectives, at the best of some random weights by the leave-one-out loss on the task's "
        "labelled examples."
    )

    def passes(self, experiment: Experiment) -> int:
        """Return the passes of all rehearsals, expected at their weights, and the most passes of the main run."""
        return run_passes(experiment, self.rehearsals(experiment))

    def phases(self, experiment: Experiment) -> tuple[int, ...]:
        """Return the steps of each rehearsal, and those of the main run."""
        return run_phases(experiment, len(experiment.names))

    def rehearse(self, experiment: Experiment) -> Tensor:
        """Return the losses of the labelled examples after pretraining at each random weights, (K, n)."""
        return rehearse(experiment, _drawn(experiment))

    def adapt(self, experiment: Experiment, callbacks: Sequence[mlopt.Callback] = ()) -> Adapted:
        """Rehearse the random weights, choose the best, and pretrain the encoder further."""
        losses = self.rehearse(experiment) if experiment.rehearsed is None else experiment.rehearsed
        weights = [*_drawn(experiment).values()][int(losses.mean(1).argmin())]
        return main_run(experiment, self.name, weights, self.rehearsals(experiment), callbacks)

    @staticmethod
    def rehearsals(experiment: Experiment) -> int:
        """Return the passes of all rehearsals, expected at their weights."""
        return rehearsal_passes(
            experiment, [drawn_passes(experiment, weights) for weights in _drawn(experiment).values()]
        )


def _drawn(experiment: Experiment) -> dict[str, dict[str, float]]:
    """Return random weights for each of the candidates, by name."""
    names = experiment.names
    draws = torch.Generator().manual_seed(derive_seed(experiment.seed, "random search"))
    # Exponential numbers over their sum are uniform on the simplex.
    points = -torch.rand(len(names), len(names), dtype=torch.float64, generator=draws).log()
    points = points / points.sum(1, keepdim=True)
    return {f"random-{k}": dict(zip(names, row, strict=True)) for k, row in enumerate(points.tolist())}
