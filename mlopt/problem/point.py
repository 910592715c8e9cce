"""A point: the present variables, one batch and one state of the generators for each level."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor
from torch.optim import Optimizer

from ..linear import History
from ..rng import GeneratorState, preserved
from ..tensors import Tensors, norm, overwrite, scale
from .estimator import Block, Estimator, Report

if TYPE_CHECKING:
    from .problem import Problem
    from .workspace import Workspace

__all__ = ["Carryover", "Point", "StreamedCotangent", "restored"]

#: Relative residual above which a solution is not reused as a warm start. Zero leaves 1, and a new batch leaves a few; under
#: negative curvature a solution that is reused would grow from step to step.
_LOST = 100.0


@attrs.define(eq=False)
class StreamedCotangent:
    """The state of a streamed pullback from one outer step to the next.

    Attributes:
        cotangent: p of the previous outer step, on the level's variables.
        signals: <grad L_k, p>, (K,), formed during the level's latest step; None until then.
    """

    cotangent: Tensors
    signals: Tensor | None = None


@contextlib.contextmanager
def restored(variables: Tensors) -> Iterator[Tensors]:
    """Yield copies of the values of live variables; restore the values from them on exit."""
    live = [variable.data for variable in variables]
    kept = tuple(value.clone() for value in live)
    try:
        yield kept
    finally:
        overwrite(live, kept)


@attrs.define(eq=False)
class Carryover:
    """The state that a run carries over from one point to the next.

    Attributes:
        optimizers: the levels' optimisers, with their state.
        engine: the engine of the run, with which a response takes steps.
        devices: the devices of the levels' variables; read from the modules if None.
        variables: the variables of each level in the present outer step; read from the modules if empty.
        warm: the last solution of each level's linear system.
        histories: the history of each level's linear systems, of solvers that keep one.
        cotangents: the state of each streamed pullback.
        held: by level whose optimiser has step hooks, where its latest step left a variable unchanged against its gradient.
        gradient_norms: by level with a `clip`, the norm of the gradient of its latest step before clipping.
        groups: by level with a scheduler, the settings of its optimiser's groups in its latest step.
    """

    optimizers: Mapping[str, Optimizer] = attrs.field(factory=dict)
    engine: Any = None
    devices: Sequence[torch.device] | None = None
    variables: Mapping[str, Tensors] = attrs.field(factory=dict)
    warm: dict[str, Tensors] = attrs.field(factory=dict)
    histories: dict[str, History] = attrs.field(factory=dict)
    cotangents: dict[str, StreamedCotangent] = attrs.field(factory=dict)
    held: dict[str, Tensors] = attrs.field(factory=dict)
    gradient_norms: dict[str, Tensor] = attrs.field(factory=dict)
    groups: dict[str, list[dict[str, Any]]] = attrs.field(factory=dict)

    def forget(self, name: str) -> None:
        """Drop the solution and the history of a level's linear system."""
        self.warm.pop(name, None)
        self.histories.pop(name, None)


class Point:
    """The variables, batches and random numbers of one hypergradient: all its evaluations use the same.

    Enter `generators_preserved()` around evaluations: on exit, the generators are as they were.

    Args:
        problem: the problem; its modules hold the variables.
        batches: the batch of each level.
        generators: the state of the random generators for evaluations of each level.
        curvature_batches: the batches for the Hessian, for each level whose estimator has curvature data.
        workspace: caches; the problem's if None.
        estimators: estimators by level that replace the problem's.
        carryover: state of the present run; None for pullbacks that do not depend on earlier ones.
        frees_gradients: True if pullbacks may free `.grad` of the levels inside, which nothing reads after them.
    """

    def __init__(
        self,
        problem: Problem,
        batches: Mapping[str, Any],
        generators: Mapping[str, GeneratorState],
        *,
        curvature_batches: Mapping[str, Sequence[Any]] | None = None,
        workspace: Workspace | None = None,
        estimators: Mapping[str, Estimator] | None = None,
        carryover: Carryover | None = None,
        frees_gradients: bool = False,
    ) -> None:
        self.problem = problem
        self.batches = batches
        self.generators = generators
        self.curvature_batches = curvature_batches or {}
        self.workspace = problem.workspace if workspace is None else workspace
        self._estimators = estimators or {}
        self.carryover = carryover
        self.frees_gradients = frees_gradients
        variables = {} if carryover is None else carryover.variables
        #: Variables by block: live parameters of levels; multipliers of nested levels are added as they are computed.
        self.values: dict[Block, Tensors] = dict(variables or {level.name: level.parameters for level in problem})
        #: By level, the state that its estimator's `at_solution` leaves for the pullback.
        self.ahead: dict[str, Any] = {}
        #: By level, the time that `at_solution` took.
        self.seconds: dict[str, float] = {}
        #: By level with a solver of its own, its gradient at the solution; outside a run.
        self.gradients: dict[str, Tensors] = {}
        self.reports: dict[str, Report] = {}

    def estimator(self, name: str) -> Estimator | None:
        """Return the estimator that pulls cotangents back through a level at this point."""
        return self._estimators.get(name, self.problem[name].estimator)

    def optimizer(self, name: str) -> Optimizer | None:
        """Return the optimiser of a level in the present run; None outside a run."""
        return None if self.carryover is None else self.carryover.optimizers.get(name)

    def gradient_norm(self, name: str) -> Tensor | None:
        """Return the norm of the gradient of a level's latest step before clipping; None outside a run, or without a `clip`."""
        return None if self.carryover is None else self.carryover.gradient_norms.get(name)

    def groups(self, name: str) -> Sequence[dict[str, Any]] | None:
        """Return the settings of a level's groups in its latest step, before its scheduler; None without a scheduler."""
        return None if self.carryover is None else self.carryover.groups.get(name)

    def last_gradient(self, name: str) -> Tensors | None:
        """Return a level's own gradient, before clipping, at its last step or where its solver left it; None if unknown."""
        if self.carryover is None:
            return self.gradients.get(name)
        variables = self.values[name]
        if all(variable.grad is None for variable in variables):
            return None
        gradient = tuple(torch.zeros_like(v) if v.grad is None else v.grad for v in variables)
        size = self.gradient_norm(name)
        if size is None:
            return gradient
        return scale(size / norm(gradient).clamp_min(torch.finfo(size.dtype).tiny), gradient)

    def free_gradient(self, name: str) -> None:
        """Free `.grad` of a level's variables."""
        for variable in self.values[name]:
            variable.grad = None

    def warm_start(self, name: str) -> Tensors | None:
        """Return the solution of a level's linear system that `keep_warm` kept, if any."""
        return None if self.carryover is None else self.carryover.warm.get(name)

    def history(self, name: str) -> History | None:
        """Return the history of a level's linear systems that `keep_warm` kept, if any."""
        return None if self.carryover is None else self.carryover.histories.get(name)

    def keep_warm(self, name: str, solution: Tensors, residual: float | None, history: History | None = None) -> None:
        """Keep a solution of a level's linear system for the next outer step of a run, unless its residual is too large.

        Args:
            name: the level.
            solution: the solution.
            residual: its residual relative to the cotangent; None if it was not measured.
            history: the history that the solve returned, if any; it is kept along with the solution.
        """
        if self.carryover is None:
            return
        self.carryover.forget(name)
        if residual is None or residual < _LOST:
            self.carryover.warm[name] = solution
            if history is not None:
                self.carryover.histories[name] = history

    @cached_property
    def devices(self) -> Sequence[torch.device]:
        """The devices of the levels' variables, each once."""
        known = None if self.carryover is None else self.carryover.devices
        if known is not None:
            return known
        return tuple(dict.fromkeys(v.device for level in self.problem for v in self.values[level.name]))

    @contextlib.contextmanager
    def generators_preserved(self) -> Iterator[None]:
        """Restore the random generators on exit. (Buffers are restored after each evaluation.)"""
        with preserved(self.devices):
            yield
