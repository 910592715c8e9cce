"""The parameters of the levels in a run, some of which callbacks may freeze and unfreeze."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import compress

from ..errors import ProblemError
from ..problem import Carryover, Level, Problem, require_all_variables
from ..shards import reshard
from ..tensors import Tensors

__all__ = ["Trained"]

Masks = Mapping[str, tuple[bool, ...]]


class Trained:
    """The parameters of each level, and which of them are its variables.

    Args:
        problem: the problem.

    Attributes:
        parameters: all parameters of each level.
        masks: by level, which of them were its variables in the latest step; those that the state of the pullbacks belongs to.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        reshard(level.module for level in problem)
        self.parameters = {level.name: tuple(level.module.parameters()) for level in problem}
        self.masks = self.present()

    def present(self) -> dict[str, tuple[bool, ...]]:
        """Return which parameters of each level are trainable now."""
        return {name: tuple([p.requires_grad for p in own]) for name, own in self.parameters.items()}

    def variables(self, masks: Masks) -> dict[str, Tensors]:
        """Return the variables of each level by masks."""
        return {name: tuple(compress(self.parameters[name], mask)) for name, mask in masks.items()}

    def begin_step(self, carryover: Carryover) -> None:
        """Set the variables of the step; drop what a level carries over for other variables than these.

        Raises:
            ProblemError: a level has no variables any more, or its optimiser leaves some out.
        """
        present = self.present()
        carryover.variables = self.variables(present)
        for level in self._problem:
            if present[level.name] != self.masks[level.name]:
                self._require_trainable(level, carryover)
                carryover.forget(level.name)
                carryover.cotangents.pop(level.name, None)
                self._problem.workspace.forget(level.name)
        self.masks.update(present)

    def _require_trainable(self, level: Level, carryover: Carryover) -> None:
        if not level.parameters:
            raise ProblemError(
                f"level {level.name!r}: all its parameters were frozen during the run; leave one trainable (requires_grad_(True))"
            )
        if (optimizer := carryover.optimizers.get(level.name)) is not None:
            require_all_variables(level, optimizer)
