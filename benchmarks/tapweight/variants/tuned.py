"""A method with other settings than those of the plan."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import attrs

import mlopt
from mlopt.errors import ArgumentError
from mlopt.recipes.tapweight.experiment import Experiment
from mlopt.recipes.tapweight.methods import Adapted, Method
from mlopt.recipes.tapweight.settings import Settings

__all__ = ["Tuned"]

#: These act in the final finetuning, which is the same for all methods of a study.
_FINAL = ("epochs", "finetune_lr", "freeze_encoder", "finetunings", "ensemble", "patience")
#: With other values of these, the rehearsals that are taken are the same.
_SAME_REHEARSALS = {"rehearsals"}


class Tuned(Method):
    """A method whose settings differ from those of the plan, so that a sweep is a comparison of methods.

    Args:
        method: the method.
        changes: "SETTING=VALUE", several separated by commas.

    Raises:
        ArgumentError: there is no such setting, or it acts in the final finetuning only.
    """

    def __init__(self, method: Method, changes: str) -> None:
        self.method = method
        self.name, self.title = f"{method.name}:{changes}", f"{method.title}, {changes}"
        self.summary, self.uses_labels = method.summary, method.uses_labels
        self.changes = dict(_change(self.name, text) for text in changes.split(","))

    def check(self, settings: Settings, steps: int, objectives: Sequence[str]) -> None:
        """Refuse what the method refuses with these settings."""
        self.method.check(attrs.evolve(settings, **self.changes), steps, objectives)

    def passes(self, experiment: Experiment) -> int:
        """Return the cost of the method with these settings."""
        return self.method.passes(self._tuned(experiment))

    def adapt(self, experiment: Experiment, callbacks: Sequence[mlopt.Callback] = ()) -> Adapted:
        """Adapt the encoder by the method with these settings."""
        return self.method.adapt(self._tuned(experiment), callbacks)

    def _tuned(self, experiment: Experiment) -> Experiment:
        settings = attrs.evolve(experiment.settings, **self.changes)
        # Phases of other settings are not these. The scales of the losses are read at the start.
        start = {"start": None} if "scale" in self.changes else {}
        shared = experiment.shared_checkpoints if set(self.changes) <= _SAME_REHEARSALS else None
        return attrs.evolve(experiment, settings=settings, shared_checkpoints=shared, **start)


def _change(method: str, text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    known = [field.name for field in attrs.fields(Settings) if field.name not in _FINAL]
    if name not in known:
        raise ArgumentError(f"{method}: no setting {name!r} of pretraining; give one of {', '.join(known)}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
