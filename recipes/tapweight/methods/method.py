"""The contract of a method: a way to adapt an encoder to a task before the encoder is finetuned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import attrs

from mlopt.solving import History

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    import mlopt

    from ..encoder import Encoder
    from ..experiment import Experiment
    from ..settings import Settings
    from ..significance import Signal

__all__ = ["Adapted", "Method"]


@attrs.frozen(kw_only=True, eq=False)
class Adapted:
    """An adapted encoder, and what the method learned on the way.

    Attributes:
        encoder: the encoder, before it is finetuned.
        weights: the weight of each objective; they sum to one. None if the method does not weigh objectives.
        signals: how each objective compares with the average of all; empty if the method does not measure this.
        history: a row for each logged step.
        steps: pretraining steps of the encoder; None if they are those of the experiment.
    """

    encoder: Encoder
    weights: Mapping[str, float] | None = None
    signals: Mapping[str, Signal] = attrs.field(factory=dict)
    history: History = attrs.field(factory=History)
    steps: int | None = None


class Method(ABC):
    """A way to adapt an encoder.

    A run gives each method the same start, batches and number of pretraining steps, then finetunes and scores the encoder of
    each in the same way.

    Attributes:
        name: the key of the method in scores, folders of checkpoints and `--methods`.
        title: the name of the method in tables.
        summary: for the card of the encoder: how the method adapted it.
        uses_labels: False if the adapted encoder does not depend on the task, so that several tasks can share it.

    Example:
        >>> from mlopt.recipes.tapweight.methods import Adapted, Equal, Method
        >>> class TwiceTheSteps(Method):
        ...     name, title = "twice", "equal weights, twice the steps"
        ...     summary = "Pretrained further at equal weights, in twice the steps."
        ...
        ...     def passes(self, experiment):
        ...         return 2 * Equal().passes(experiment)
        ...
        ...     def adapt(self, experiment, callbacks=()):
        ...         model = experiment.model()
        ...         experiment.solve(self.name, Equal().problem(experiment, model), 2 * experiment.pretraining_steps)
        ...         return Adapted(encoder=model.encoder)
    """

    name: str
    title: str
    summary: str
    uses_labels: bool = True

    def check(self, settings: Settings, steps: int, objectives: Sequence[str]) -> None:  # noqa: B027 (most runs are possible)
        """Refuse a run that is not possible, before any data are read.

        Args:
            settings: the numbers of the run.
            steps: pretraining steps.
            objectives: the names of the objectives.

        Raises:
            ValueError: the run is not possible.
        """

    @abstractmethod
    def passes(self, experiment: Experiment) -> int:
        """Return the cost of `adapt`: how often the encoder is evaluated on a batch. A backward pass is not counted."""

    def phases(self, experiment: Experiment) -> tuple[int, ...]:
        """Return the outer steps of each phase that `adapt` solves, in their order; by default one phase of pretraining."""
        return (experiment.pretraining_steps,)

    def rehearse(self, experiment: Experiment) -> Tensor | None:
        """Return the losses that `adapt` finds in `experiment.rehearsed`; by default None.

        Several processes share rehearsals: all call this function, and one of them then calls `adapt`.
        """
        return None

    @abstractmethod
    def adapt(self, experiment: Experiment, callbacks: Sequence[mlopt.Callback] = ()) -> Adapted:
        """Adapt the encoder.

        Args:
            experiment: the start, the batches and the settings. Each phase of the method is solved by `experiment.solve` under
                a name of its own.
            callbacks: see `mlopt.Callback`; for the main phase of the method.
        """
