"""The evaluations in the steps of levels: their inputs are recorded, and their values logged."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..finiteness import require_finite
from ..problem import (
    Level,
    LossValue,
    Problem,
    evaluate_loss,
    evaluate_regularizer,
    evaluate_residual,
    require_mean,
    sum_values,
)
from ..rng import GeneratorState
from ..tensors import Tensors
from .row import Row, is_number

__all__ = ["Evaluations"]


class Evaluations:
    """Evaluates objectives and residuals on the latest batches, with the generators and buffers of training.

    Args:
        problem: the problem.

    Attributes:
        modules: by level, its module and those of the levels that it refers to.
        batches: the latest batch of each level.
        generators: for each level with an estimator, the state of the generators before its latest evaluation.
        row: the values that the levels logged in the current outer step.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem, self._devices = problem, problem.devices
        self.modules = {
            level.name: {name: problem[name].module for name in (level.name, *level.references)} for level in problem
        }
        self.batches: dict[str, Any] = {}
        self.generators: dict[str, GeneratorState] = {}
        self.row = Row()

    def record(self, level: Level, batch: Any, *, replayed: bool) -> None:
        """Record the batch, and the state of the generators if a pullback will replay the evaluation."""
        self.batches[level.name] = batch
        self.require_mean(level, batch)
        if replayed and self._problem.needs_estimator(level.name):
            self.generators[level.name] = GeneratorState.capture(self._devices)

    def require_mean(self, level: Level, batch: Any) -> None:
        """On several processes, compare the loss on a whole batch with the sum of its pieces, now and then."""
        if self._problem.ranks.several:
            require_mean(self._problem, level, batch)

    def loss(self, level: Level) -> LossValue:
        """Return the value of the loss of a level."""
        modules, batch, problem = self.modules[level.name], self.batches[level.name], self._problem
        return evaluate_loss(level, modules, batch, problem.workspace, inspected=problem, ranks=problem.ranks)

    def regularized(self, level: Level, loss: Tensor) -> Tensor:
        """Return the objective of a level, given the value of its loss."""
        if level.regularizer is None:
            return loss
        return sum_values((loss, self.regularizer(level)))

    def regularizer(self, level: Level) -> Tensor:
        """Return the regularizer of a level; on several processes, the piece of this one."""
        problem = self._problem
        value = evaluate_regularizer(level, self.modules[level.name], problem.workspace, inspected=problem)
        return value / problem.ranks.size if problem.ranks.several else value

    def residual(self, level: Level, variables: Tensors) -> Tensors:
        """Return the residual of a level."""
        modules, batch, problem = self.modules[level.name], self.batches[level.name], self._problem
        named = dict(zip(level.parameter_names, variables, strict=True))
        return evaluate_residual(level, modules, batch, named, problem.workspace, inspected=problem)

    def log(self, level: Level, loss: Tensor, value: LossValue, share: float, *, first: bool) -> None:
        """Add `share` times the values of one evaluation to the row of this outer step; raise if the loss is not finite."""
        several, label = self._problem.ranks.several, level.name
        self.row.add(f"{label}/loss", loss, share, first=first)
        for name, x in value.logs.items():
            # Copies, because logged variables will change.
            kept = x.detach().clone() if isinstance(x, Tensor) else x
            if several and name != "count" and is_number(x):
                kept = value.share * kept
            self.row.add(f"{label}/{name}", kept, share, first=first)
        if several:
            return  # the sum over processes is tested
        require_finite((), lambda number: f"the loss of level {label!r} is {number}", size=loss)
