"""A point: the present variables, one batch and one state of the generators for each level."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor
from torch.optim import Optimizer

from ..rng import GeneratorState, preserved
from ..tensors import Tensors
from .estimator import Block, Report

if TYPE_CHECKING:
    from .problem import Problem

__all__ = ["Point", "StreamedCotangent", "restored"]

#: A residual, over the cotangent, at which a solution is no start for the next solve: zero leaves 1, batches that differ leave a
#: few, and where curvature is negative a solution that is kept would grow from step to step.
_LOST = 100.0


@attrs.define(eq=False)
class StreamedCotangent:
    """What a streamed pullback holds from one outer step to the next.

    Attributes:
        cotangent: p of the previous outer step, on the level's variables.
        signals: <grad L_k, p>, (K,), formed during the level's latest step; None until then.
    """

    cotangent: Tensors
    signals: Tensor | None = None


@contextlib.contextmanager
def restored(variables: Tensors) -> Iterator[Tensors]:
    """Give copies of the values of live variables, and put the values back from them on leaving."""
    live = [variable.data for variable in variables]
    kept = tuple(value.clone() for value in live)
    try:
        yield kept
    finally:
        torch._foreach_copy_(live, kept)


class Point:
    """Where everything that one hypergradient needs is evaluated: same variables, batches and random numbers throughout.

    Enter `generators_preserved()` around evaluations: on leaving, the generators are as they were.

    Args:
        problem: the problem; its modules hold the variables.
        batches: the batch of each level.
        generators: where the random generators stand when a level is evaluated.
        warm: last solution of each level's linear system, kept by whoever wants warm starts; None for cold ones.
        streams: cotangents held by streamed pullbacks; None where nothing is streamed.
        curvature_batches: the batch for the Hessian, of each level whose estimator has one of its own.
        optimizers: the levels' optimisers, with their state, where a run is under way.
        devices: those that the levels' variables are on, where that is known already.
        variables: of each level, where they are known already.
    """

    def __init__(
        self,
        problem: Problem,
        batches: Mapping[str, Any],
        generators: Mapping[str, GeneratorState],
        warm: dict[str, Tensors] | None = None,
        streams: dict[str, StreamedCotangent] | None = None,
        curvature_batches: Mapping[str, Any] | None = None,
        optimizers: Mapping[str, Optimizer] | None = None,
        devices: Sequence[torch.device] | None = None,
        variables: Mapping[str, Tensors] | None = None,
    ) -> None:
        self.problem = problem
        self.batches = batches
        self.generators = generators
        self.warm = warm
        self.streams = streams
        self.curvature_batches = curvature_batches or {}
        self.optimizers = optimizers or {}
        self.devices = problem.devices if devices is None else devices
        #: Variables by block. Levels' are the live parameters; multipliers of nested levels are put in as they are found.
        self.values: dict[Block, Tensors] = dict(variables or {level.name: level.parameters for level in problem})
        #: What `at_solution` of a level's estimator left for its pullback.
        self.ahead: dict[str, Any] = {}
        #: Seconds that `at_solution` took.
        self.seconds: dict[str, float] = {}
        self.reports: dict[str, Report] = {}

    def keep_warm(self, name: str, solution: Tensors, residual: float | None) -> None:
        """Keep a solution of a level's linear system for the next outer step, where warm starts are kept and it is fit to be one.

        Args:
            name: the level.
            solution: what was found.
            residual: what it leaves of the cotangent; None where that was not measured.
        """
        if self.warm is None:
            return
        if residual is None or residual < _LOST:
            self.warm[name] = solution
        else:
            self.warm.pop(name, None)

    @contextlib.contextmanager
    def generators_preserved(self) -> Iterator[None]:
        """Put the random generators back on leaving. (Buffers are put back after each evaluation.)"""
        with preserved(self.devices):
            yield
