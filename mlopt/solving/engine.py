"""The steps of levels: what one step of a level does, and which levels are solved before it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..errors import NonFiniteError, ProblemError
from ..generators import GeneratorState
from ..hypergradient import accumulate, lookahead, partial_derivatives
from ..problem import (
    Level,
    Mixture,
    Outcome,
    Point,
    Problem,
    Report,
    Stream,
    StreamedCotangent,
    cloned_buffers,
    read_outcome,
    scalar,
)
from ..tensors import Tensors, axpy, dot, is_finite, scale

__all__ = ["Engine"]


class Engine:
    """The moving parts of a run: optimisers, schedulers, data streams, and what pullbacks keep from step to step.

    Args:
        problem: the problem.
        seed: of the order of every level's data.

    Raises:
        ProblemError: a level has no optimiser, or one that does not train the level's variables.
    """

    def __init__(self, problem: Problem, seed: int) -> None:
        self.problem = problem
        self.optimizers = {level.name: _optimizer(level) for level in problem}
        self.schedulers = {level.name: _scheduler(level, self.optimizers[level.name]) for level in problem}
        self.streams = {level.name: Stream(level.name, level.data, seed, level.device) for level in problem}
        self.curvature_streams = {
            level.name: Stream(f"{level.name}/curvature data", level.estimator.curvature_data, seed, level.device)
            for level in problem
            if level.estimator is not None and level.estimator.curvature_data is not None
        }
        self.batches: dict[str, Any] = {}
        self.generators: dict[str, GeneratorState] = {}
        self.warm: dict[str, Tensors] = {}
        self.cotangents: dict[str, StreamedCotangent] = {}
        self.logs: dict[str, Any] = {}
        self.reports: dict[str, Report] = {}
        #: For levels whose pullback was doubtful: in how many steps, and what the latest report said.
        self.doubts: dict[str, tuple[int, str]] = {}

    def step(self, level: Level, *, last: bool = True) -> None:
        """Solve the levels inside, innermost listed first, then take one step of the level.

        Args:
            level: the level.
            last: whether this is the last step of the present solve of the level.
        """
        for name in self.problem.graph[level.name].guests:
            guest = self.problem[name]
            for k in range(guest.steps):
                self.step(guest, last=k == guest.steps - 1)
        self.batches[level.name] = self.streams[level.name].next()
        if last and self.problem.needs_estimator(level.name):
            # A pullback replays what the latest step draws.
            self.generators[level.name] = GeneratorState.capture(self.problem.devices)
        optimizer = self.optimizers[level.name]
        optimizer.zero_grad(set_to_none=True)
        loss = self._differentiate(level, last)
        self._check_gradient(level)
        optimizer.step()
        scheduler = self.schedulers[level.name]
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(float(loss))
        elif scheduler is not None:
            scheduler.step()

    def _differentiate(self, level: Level, last: bool) -> Tensor:
        """Set `.grad` of the level's variables to its total gradient; return the loss."""
        held = self.cotangents.get(level.name) if last else None
        others = [self.problem[name].module for name in level.references]
        # Only a level's own training steps keep what its module does to its buffers.
        with cloned_buffers(others):
            if self.problem.graph[level.name].parts:
                outcome, loss = self._total_gradient(level)
            else:
                outcome, loss = self._own_gradient(level, held)
        self.logs[f"{level.name}/loss"] = loss.detach()
        for name, value in outcome.logs.items():
            # A copy: a variable that is logged goes on to change.
            self.logs[f"{level.name}/{name}"] = value.detach().clone() if isinstance(value, Tensor) else value
        return loss.detach()

    def _own_gradient(self, level: Level, held: StreamedCotangent | None) -> tuple[Outcome, Tensor]:
        outcome = self._outcome(level)
        if isinstance(outcome.loss, Mixture):
            return outcome, self._mixture_gradient(level, outcome.loss, held)
        loss = self._check(level, outcome.loss + self._regularizer(level))
        if not loss.requires_grad:
            raise ProblemError(
                f"the loss of level {level.name!r} has no gradient: was it computed under no_grad, or detached?"
            )
        loss.backward(inputs=list(level.parameters))  # type: ignore[no-untyped-call]
        return outcome, loss

    def _outcome(self, level: Level) -> Outcome:
        others = {name: self.problem[name].module for name in level.loss_references}
        outcome = read_outcome(level.loss(level.module, self.batches[level.name], **others), level)
        self.problem.mixtures[level.name] = outcome.loss.weights if isinstance(outcome.loss, Mixture) else None
        return outcome

    def _regularizer(self, level: Level) -> Tensor | float:
        if level.regularizer is None:
            return 0.0
        others = {name: self.problem[name].module for name in level.regularizer_references}
        return scalar(level.regularizer(level.module, **others), f"the regularizer of level {level.name!r}")

    def _check_gradient(self, level: Level) -> None:
        gradient = [variable.grad for variable in level.parameters if variable.grad is not None]
        if not gradient:
            raise ProblemError(
                f"the loss of level {level.name!r} does not depend on its own variables; does it use its first argument?"
            )
        if not is_finite(gradient):
            raise NonFiniteError(
                f"the gradient of level {level.name!r} is not finite; its variables are as they were before this step"
            )

    def _check(self, level: Level, loss: Tensor) -> Tensor:
        if not math.isfinite(loss.item()):
            raise NonFiniteError(
                f"the loss of level {level.name!r} is {loss.item()}; its variables are as they were before this step"
            )
        return loss

    def _total_gradient(self, level: Level) -> tuple[Outcome, Tensor]:
        interior = self.problem.graph[level.name].interior
        curvature = {name: stream.next() for name, stream in self.curvature_streams.items() if name in interior}
        point = Point(
            self.problem, self.batches, self.generators, self.warm, self.cotangents, curvature, self.optimizers
        )
        with lookahead(point, level):
            outcome = self._outcome(level)
            loss = outcome.total({name: self.problem[name].module for name in (level.name, *level.loss_references)})
            loss = loss + self._regularizer(level)
            cotangents = partial_derivatives(self.problem, level, loss)
            with point.untouched():
                gradient = accumulate(point, level, cotangents)
        for variable, derivative in zip(level.parameters, gradient, strict=True):
            variable.grad = derivative.detach()
        self.reports |= point.reports
        for name, report in point.reports.items():
            if report.doubtful:
                self.doubts[name] = (self.doubts.get(name, (0, ""))[0] + 1, "; ".join(report.remarks))
        return outcome, loss

    def _mixture_gradient(self, level: Level, mixture: Mixture, held: StreamedCotangent | None) -> Tensor:
        """Take the losses one by one, each through its own network pass; note <grad L_k, p> where a cotangent p is held."""
        weights = mixture.weigh(self.problem[mixture.weights].module).detach()
        variables, apart = list(level.parameters), self.problem[mixture.weights].parameters
        total = torch.zeros((), device=level.device)
        signals: list[Tensor] = []
        mixed: Tensors = ()
        for k in range(len(mixture)):
            loss, gradient = mixture.gradient(k, variables, apart)
            self.logs[f"{level.name}/{mixture.names[k]}"] = self._check(level, loss)
            weight = weights[k].to(loss.device)
            total = total + weight * loss
            if held is not None:
                signals.append(dot(gradient, held.cotangent))
            mixed = scale(weight, gradient) if k == 0 else axpy(weight, gradient, mixed)
        for variable, derivative in zip(variables, mixed, strict=True):
            variable.grad = derivative
        if held is not None:
            held.signals = torch.stack(signals)
        regularizer = self._regularizer(level)
        if isinstance(regularizer, Tensor):
            if regularizer.requires_grad:
                regularizer.backward(inputs=variables)  # type: ignore[no-untyped-call]
            total = total + regularizer.detach()
        return total


_OPTIONAL = inspect.Parameter("closure", inspect.Parameter.KEYWORD_ONLY, default=None)


def _optimizer(level: Level) -> Optimizer:
    """Make the level's optimiser, or check the one that it brought."""
    if level.optimizer is None:
        raise ProblemError(
            f"level {level.name!r}: optimizer=None, and solve steps every level; give one, such as "
            "partial(torch.optim.SGD, lr=0.1)"
        )
    made: Any = level.optimizer
    if not isinstance(made, Optimizer):
        made = made(list(level.parameters))
    if not isinstance(made, Optimizer):
        raise ProblemError(
            f"level {level.name!r}: optimizer returned a {type(made).__name__}; it must take parameters and return a "
            "torch.optim.Optimizer"
        )
    own = {id(variable) for variable in level.parameters}
    held = {id(variable) for group in made.param_groups for variable in group["params"] if variable.requires_grad}
    if not held <= own:
        raise ProblemError(
            f"level {level.name!r}: its optimizer also holds {len(held - own)} tensors that are not the level's variables; "
            "give each level an optimizer of its own"
        )
    if own - held:
        raise ProblemError(
            f"level {level.name!r}: its optimizer leaves out {len(own - held)} of the level's {len(own)} trainable tensors; add "
            "them, or freeze them with requires_grad_(False)"
        )
    if inspect.signature(made.step).parameters.get("closure", _OPTIONAL).default is inspect.Parameter.empty:
        raise ProblemError(
            f"level {level.name!r}: {type(made).__name__} evaluates the loss itself, several times a step, which levels do "
            "not offer; use an optimizer that takes a gradient, such as torch.optim.SGD or Adam"
        )
    return made


def _scheduler(level: Level, optimizer: Optimizer) -> Any:
    factory: Callable[[Optimizer], Any] | None = level.scheduler
    if factory is None:
        return None
    scheduler = factory(optimizer)
    if not hasattr(scheduler, "step"):
        raise ProblemError(
            f"level {level.name!r}: scheduler returned a {type(scheduler).__name__}; it must take the optimizer and return a "
            "scheduler, such as partial(torch.optim.lr_scheduler.StepLR, step_size=100)"
        )
    return scheduler
