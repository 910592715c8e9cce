"""The plan of a run: the phases of its methods and of its finetuning, and their cost."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import attrs
from rich.table import Table

from mlopt.durations import in_words

from .finetuning import finetuning_cost

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .experiment import Experiment
    from .methods import Method

__all__ = ["Part", "Plan"]


@attrs.frozen(kw_only=True)
class Part:
    """A part of a run.

    Attributes:
        phases: the outer steps of each of its phases.
        passes: the most evaluations of the encoder on a batch.
        seconds: a rough time on this machine.
    """

    phases: tuple[int, ...]
    passes: int
    seconds: float

    def row(self) -> tuple[str, str, str]:
        """Return the phases, the passes and the time in words."""
        phases = ", ".join(f"{count} of {steps:,} steps" for steps, count in Counter(self.phases).items())
        return phases or "none", f"{self.passes:,}", in_words(self.seconds) if self.passes else ""


@attrs.frozen(kw_only=True)
class Plan:
    """The parts of a run; its text is a sentence on the cost.

    Attributes:
        methods: the pretraining by each method, by name.
        finetuning: the finetunings of all adapted encoders.
    """

    methods: Mapping[str, Part]
    finetuning: Part

    @classmethod
    def of(
        cls, experiments: Mapping[str, Experiment], methods: Sequence[Method], finetunings: Mapping[str, int]
    ) -> Plan:
        """Return the plan of a run.

        Args:
            experiments: by the name of the method.
            methods: the methods, at least one.
            finetunings: how often each method's encoder is finetuned, by the name of the method.
        """
        parts = {}
        for method in methods:
            experiment = experiments[method.name]
            phases, passes = method.phases(experiment), method.passes(experiment)
            parts[method.name] = Part(phases=phases, passes=passes, seconds=experiment.seconds(passes))
        count = sum(finetunings.values())
        cost = finetuning_cost(experiment.encoder, experiment.task, experiment.settings, seed=experiment.seed)
        finetuning = Part(phases=(cost.steps,) * count, passes=cost.passes * count, seconds=cost.seconds * count)
        return cls(methods=parts, finetuning=finetuning)

    @property
    def pretraining(self) -> Part:
        """The pretraining by all methods."""
        return _together([*self.methods.values()])

    @property
    def whole(self) -> Part:
        """The whole run."""
        return _together((self.pretraining, self.finetuning))

    def __str__(self) -> str:
        pretraining, finetuning = self.pretraining, self.finetuning
        parts = ", ".join(f"{name} {part.passes:,}" for name, part in self.methods.items())
        return (
            f"Pretraining takes at most {pretraining.passes:,} encoder passes ({parts}): about "
            f"{in_words(pretraining.seconds)} on this machine. Finetuning takes at most {finetuning.passes:,}: about "
            f"{in_words(finetuning.seconds)}."
        )

    def table(self) -> Table:
        """Return the parts as a table."""
        table = Table("part", "phases", "encoder passes", "time", title="Plan")
        for name, part in self.methods.items():
            table.add_row(name, *part.row())
        table.add_row("finetuning", *self.finetuning.row(), end_section=True)
        _, passes, time = self.whole.row()
        table.add_row("together", f"{len(self.whole.phases)} phases", passes, time)
        return table


def _together(parts: Sequence[Part]) -> Part:
    return Part(
        phases=tuple(steps for part in parts for steps in part.phases),
        passes=sum(part.passes for part in parts),
        seconds=sum(part.seconds for part in parts),
    )
