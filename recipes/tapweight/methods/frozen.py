"""Pretraining from the start at weights that the three levels learned."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from .fixed import Given
from .method import Adapted, Method
from .tapweight import ThreeLevels

if TYPE_CHECKING:
    from collections.abc import Sequence

    import mlopt

    from ..experiment import Experiment

__all__ = ["Frozen"]


class Frozen(Method):
    """Two phases: the three levels learn weights; then the start is pretrained at these weights, for as many steps.

    The encoder is that of the second phase. The weights, the signals and the history are those of the first, and callbacks
    are called in it.

    Source: Zhang, Somayajula & Xie, TMLR 2025 (arXiv 2410.10006), table 7.
    """

    name, title = "frozen", "learned weights, frozen"
    summary = (
        "Pretrained further with several objectives at weights that an earlier phase learned from the validation loss of a task "
        "(Zhang, Somayajula & Xie, TMLR 2025, arXiv 2410.10006)."
    )

    def __init__(self) -> None:
        # A name of its own: a run may compare the three levels as well, and each phase has a folder.
        self._learner = ThreeLevels(name=f"{self.name}-learning")

    def passes(self, experiment: Experiment) -> int:
        """Return the passes of both phases."""
        return self._learner.passes(experiment) + experiment.pretraining_steps * experiment.views

    def phases(self, experiment: Experiment) -> tuple[int, ...]:
        """Return the steps of both phases."""
        return (*self._learner.phases(experiment), experiment.pretraining_steps)

    def adapt(self, experiment: Experiment, callbacks: Sequence[mlopt.Callback] = ()) -> Adapted:
        """Learn the weights, then pretrain the encoder at them."""
        learned = self._learner.adapt(experiment, callbacks)
        assert learned.weights is not None
        pretrained = Given(learned.weights, name=self.name).adapt(experiment)
        return attrs.evolve(learned, encoder=pretrained.encoder)
