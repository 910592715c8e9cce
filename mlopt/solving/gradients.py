"""The gradient of a step of a level: the derivative of its objective, plus pullbacks through the levels inside it."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor

from ..errors import ProblemError, TrustWarning
from ..finiteness import immediate, require_finite
from ..hypergradient import at_solutions, total_derivative
from ..problem import (
    Block,
    Carryover,
    Level,
    Mixture,
    Point,
    Problem,
    Report,
    Response,
    Stream,
    StreamedCotangent,
    add_into,
    backward,
    call_solver,
    cloned_buffers,
    partial_derivatives,
    partial_pieces,
    sum_values,
)
from ..rng import GeneratorState
from ..tensors import Tensors, add, axpy_, dot, is_finite, norm, scale
from .evaluations import Evaluations
from .precision import Precision
from .sums import StepSums

__all__ = ["Gradients"]


_NOTHING = contextlib.nullcontext()
_NO_SIGNALS = torch.zeros(0)
#: A number in a remark, which changes from step to step.
_NUMBER = re.compile(r"[-+]?(?:\d[\d.,e+-]*|\b(?:inf|nan)\b)")


class Gradients:
    """Computes the gradients of steps, and keeps the state of pullbacks between steps.

    Args:
        problem: the problem.
        optimizers: the optimiser of each level, which estimators may read.
        precisions: the precision of each level.
        seed: seed of the order of curvature data.
        keep: True if `.grad` of every level stays until its next step, because a callback may read it.

    Attributes:
        carryover: state that the points of this run share.
        batches: the latest batch of each level.
        generators: for each level with an estimator, the state of the generators before its latest evaluation.
        curvature_streams: for each estimator with curvature data, the stream of these data.
        response_streams: if the outermost level has a response, its stream for each level inside.
        row: the values that the levels logged in the current outer step.
        reports: the last report of each level.
        doubts: for each level whose pullback was doubtful, the number of such steps and the latest remarks.
    """

    def __init__(
        self,
        problem: Problem,
        optimizers: Mapping[str, Any],
        precisions: Mapping[str, Precision],
        seed: int,
        *,
        keep: bool = True,
    ) -> None:
        self.problem, self._precisions, self._seed, self._keep = problem, precisions, seed, keep
        self._devices = problem.devices
        self.carryover = Carryover(optimizers=optimizers, devices=self._devices)
        self.curvature_streams = {
            level.name: Stream(f"{level.name}/curvature data", level.estimator.curvature_data, seed, level.device)
            for level in problem
            if level.estimator is not None and level.estimator.curvature_data is not None
        }
        self.response_streams = {
            level.name: Stream(f"{level.name}/response", level.data, seed, level.device)
            for level in problem.levels[1:]
            if problem.outermost.response is not None
        }
        self._evaluations = evaluations = Evaluations(problem)
        self.batches, self.generators, self.row = evaluations.batches, evaluations.generators, evaluations.row
        self._sums = StepSums(problem.ranks, self.row)
        self.reports: dict[str, Report] = {}
        self.doubts: dict[str, tuple[int, str]] = {}
        #: The kinds of remarks that were warned of: a level and a remark without its numbers.
        self._warned: set[tuple[str, str]] = set()

    def rehearsal(self) -> Gradients:
        """Return gradients for steps that will be rolled back: from the same state of pullbacks, with logs of their own."""
        other = Gradients(self.problem, self.carryover.optimizers, self._precisions, self._seed)
        other._warned, other._sums = self._warned, self._sums.on(other.row)
        other.carryover.warm = dict(self.carryover.warm)
        other.carryover.histories = dict(self.carryover.histories)
        other.carryover.cotangents = {name: attrs.evolve(held) for name, held in self.carryover.cotangents.items()}
        return other

    def differentiate(self, level: Level, batches: Sequence[Any], *, last: bool) -> Tensor:
        """Set `.grad` of the variables of a level to its total gradient, the mean over batches; return the loss, detached.

        For a level with a residual, set `.grad` to that, and return its norm.

        Args:
            level: the level.
            batches: one or more batches.
            last: whether this is the last step in the current solve of the level.
        """
        variables = self.carryover.variables[level.name]
        others = [self.problem[name].module for name in level.references]
        # Only the steps of a level itself may change the buffers of its module.
        with cloned_buffers(others, apart=level.module) if others else _NOTHING:
            self.row.begin()
            if level.residual is not None:
                loss = self._residual(level, variables, batches, last)
            elif level.response is not None:
                loss = self._response_gradient(level, level.response, variables, batches)
            else:
                nested = bool(self.problem.graph[level.name].parts)
                loss = (self._total_gradient if nested else self._own_gradient)(level, variables, batches, last)
        self.row.require_complete(len(batches))
        return loss

    def solve_alone(self, level: Level, batch: Any) -> None:
        """Let the solver of a level move its variables; set `.grad` to the gradient there, and log the loss.

        The solver starts from the same random numbers as the evaluation, and as the evaluations of a pullback.
        """
        others = [self.problem[name].module for name in level.references]
        before = GeneratorState.capture(self._devices)
        with cloned_buffers(others, apart=level.module) if others else _NOTHING, immediate():
            call_solver(level, self._evaluations.modules[level.name], batch, self.problem)
        after = GeneratorState.capture(self._devices)
        before.restore()
        with cloned_buffers([level.module]):
            self.differentiate(level, [batch], last=True)
        after.restore()

    def _residual(self, level: Level, variables: Tensors, batches: Sequence[Any], last: bool) -> Tensor:
        """Set `.grad` to the residual of a level, the mean over batches; log and return its norm."""
        precision = self._precisions[level.name]
        total: Tensors = ()
        for k, batch in enumerate(batches):
            self._evaluations.record(level, batch, replayed=last and k == len(batches) - 1)
            with precision.autocast:
                value = self._evaluations.residual(level, variables)
            own = tuple(entry.detach() for entry in value)
            total = own if k == 0 else add(total, own)
        # A copy, because a residual may return a variable.
        total = scale(1.0 / len(batches), total)
        size = norm(total)
        require_finite((), _not_finite(f"the norm of the residual of level {level.name!r}"), size=size)
        self.row.values[f"{level.name}/residual"] = size
        for variable, derivative in zip(variables, precision.scaled_vectors(total), strict=True):
            variable.grad = derivative
        return size

    def _own_gradient(self, level: Level, variables: Tensors, batches: Sequence[Any], last: bool) -> Tensor:
        streamed = self.carryover.cotangents.get(level.name) if last else None
        evaluate = partial(self._backward_all, level, variables, batches, last, streamed)
        if self.problem.ranks.several:
            loss, signals = self._sums.gradients(level.name, variables, evaluate, streamed=streamed is not None)
        else:
            loss, signals = evaluate()
        if streamed is not None and signals.numel():
            # If the scaled losses overflowed, the pullback recomputes the signals.
            overflow = self._precisions[level.name].scaler is not None and not is_finite((signals,))
            streamed.signals = None if overflow else signals
        return loss

    def _backward_all(
        self,
        level: Level,
        variables: Tensors,
        batches: Sequence[Any],
        last: bool,
        streamed: StreamedCotangent | None,
    ) -> tuple[Tensor, Tensor]:
        """Set `.grad` to the level's own gradient, the mean over batches; return the loss, and the signals of a mixture."""
        precision, share = self._precisions[level.name], 1.0 / len(batches)
        losses, signals = [], []
        for k, batch in enumerate(batches):
            self._evaluations.record(level, batch, replayed=last and k == len(batches) - 1)
            with precision.autocast:
                value = self._evaluations.loss(level)
            if isinstance(value.loss, Mixture):
                loss, signal = self._backward_mixture(level, variables, value.loss, streamed, share, first=k == 0)
                signals.append(signal)
            else:
                loss = self._backward(level, variables, value.loss, share)
            losses.append(loss)
            self._evaluations.log(level, loss, value, share, first=k == 0)
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        if signals:
            return loss, torch.stack(signals).sum(0)
        return loss, loss.new_zeros(0) if self.problem.ranks.several else _NO_SIGNALS

    def _backward(self, level: Level, variables: Tensors, loss: Tensor, share: float) -> Tensor:
        """Add `share` times the gradient of the objective to `.grad`; return the objective, detached."""
        loss = self._evaluations.regularized(level, loss)
        if not loss.requires_grad:
            raise ProblemError(
                f"the loss of level {level.name!r} has no gradient: was it computed under no_grad, or detached?"
            )
        scaled = self._precisions[level.name].scaled(loss)
        self._add_gradient(level, variables, scaled if share == 1.0 else share * scaled)
        # Copy a loss that is a variable or a view of one, because the step will change it.
        return loss.detach().clone() if loss.is_leaf or loss._is_view() else loss.detach()

    def _add_gradient(self, level: Level, variables: Tensors, value: Tensor) -> None:
        """Add the gradient of a value to `.grad` of the variables of a level."""
        if not self.problem.sharded:
            value.backward(inputs=variables)  # type: ignore[no-untyped-call]
            return
        gradient = backward(value, [level.name], self.carryover.variables)[level.name]
        for variable, derivative in zip(variables, gradient, strict=True):
            if derivative is not None:
                variable.grad = derivative if variable.grad is None else variable.grad + derivative

    def _backward_mixture(
        self,
        level: Level,
        variables: Tensors,
        mixture: Mixture,
        streamed: StreamedCotangent | None,
        share: float,
        *,
        first: bool,
    ) -> tuple[Tensor, Tensor]:
        """Do the same for a mixture, one loss at a time; also return <grad L_k, p>, given a streamed cotangent p."""
        precision = self._precisions[level.name]
        weights = mixture.weigh(self.problem[mixture.weights].module).detach()
        apart = self.problem[mixture.weights].parameters
        total = torch.zeros((), device=variables[0].device)
        signals: list[Tensor] = []
        mixed: Tensors = ()
        for k in range(len(mixture)):
            with precision.autocast:
                loss = mixture.loss(k)
            loss, gradient = loss.detach(), mixture.gradient(k, variables, apart, precision.scaled(loss))
            self.row.add(f"{level.name}/{mixture.names[k]}", loss, share, first=first)
            if not self.problem.ranks.several:  # the sum over processes is tested
                require_finite((), _not_finite(f"loss {mixture.names[k]!r} of level {level.name!r}"), size=loss)
            weight = weights[k].to(loss.device)
            total = total + weight * loss
            if streamed is not None:
                (signal,) = precision.unscaled([dot(gradient, streamed.cotangent)])
                if level.name in self.problem.sharded:
                    signal = signal / self.problem.ranks.size  # it is that of the whole loss, in every process
                signals.append(share * signal)
            if k == 0:
                mixed = scale(weight, gradient)
            else:
                axpy_(weight, gradient, mixed)
        if share != 1.0:
            mixed = scale(share, mixed)
        for variable, derivative in zip(variables, mixed, strict=True):
            variable.grad = derivative if variable.grad is None else variable.grad + derivative
        if level.regularizer is not None:
            regularizer = self._evaluations.regularizer(level)
            if regularizer.requires_grad:
                self._add_gradient(level, variables, share * precision.scaled(regularizer))
            total = sum_values((total, regularizer.detach()))
        return total, torch.stack(signals) if signals else weights.new_zeros(0)

    def _total_gradient(self, level: Level, variables: Tensors, batches: Sequence[Any], last: bool) -> Tensor:
        """Set `.grad` to the total gradient: average the cotangents over the batches, and pull them back once."""
        interior = self.problem.graph[level.name].interior
        curvature = {
            name: stream.take(rule.curvature_batches)
            for name, stream in self.curvature_streams.items()
            if name in interior and (rule := self.problem[name].estimator) is not None
        }
        point = Point(
            self.problem,
            self.batches,
            self.generators,
            curvature_batches=curvature,
            carryover=self.carryover,
            # The outermost level is the last that pulls back through the others in an outer step.
            frees_gradients=not self._keep and level is self.problem.outermost,
        )
        precision, share = self._precisions[level.name], 1.0 / len(batches)

        def evaluate() -> tuple[dict[Block, Tensors], Tensor]:
            losses = []
            cotangents: dict[Block, Tensors] = {}
            for k, batch in enumerate(batches):
                self._evaluations.record(level, batch, replayed=last and k == len(batches) - 1)
                with precision.autocast:
                    value = self._evaluations.loss(level)
                    loss = value.total(self._evaluations.modules[level.name])
                loss = self._evaluations.regularized(level, loss)
                losses.append(loss.detach().clone())
                self._evaluations.log(level, losses[-1], value, share, first=k == 0)
                scaled = precision.scaled(loss)
                differentiate = partial_pieces if self.problem.ranks.several else partial_derivatives
                add_into(cotangents, differentiate(point, level, scaled if share == 1.0 else share * scaled))
            return cotangents, losses[0] if len(losses) == 1 else torch.stack(losses).mean()

        with at_solutions(point, level):
            several = self.problem.ranks.several
            cotangents, loss = self._sums.cotangents(level.name, point, evaluate) if several else evaluate()
            cotangents = {block: precision.unscaled(vectors) for block, vectors in cotangents.items()}
            if precision.scaler is not None and not all(is_finite(vectors) for vectors in cotangents.values()):
                # The backward pass of the scaled loss overflowed: NaN makes the scaler skip this step.
                gradient = tuple(torch.full_like(variable, torch.nan) for variable in variables)
            else:
                with point.generators_preserved():
                    gradient = precision.scaled_vectors(total_derivative(point, level, cotangents))
        for variable, derivative in zip(variables, gradient, strict=True):
            variable.grad = derivative.detach()
        self._keep_reports(point)
        return loss

    def _response_gradient(
        self, level: Level, response: Response, variables: Tensors, batches: Sequence[Any]
    ) -> Tensor:
        """Set `.grad` to the total derivative by the response of a level; log and return the loss at the present point."""
        self.batches[level.name] = batches[-1]
        self.generators[level.name] = GeneratorState.capture(self._devices)
        self._evaluations.require_mean(level, batches[-1])

        def evaluate() -> tuple[Sequence[Tensor], Tensor]:
            value = self._evaluations.loss(level)
            loss = value.total(self._evaluations.modules[level.name])
            loss = self._evaluations.regularized(level, loss).detach().clone()
            self._evaluations.log(level, loss, value, 1.0, first=True)
            return (), loss

        _, loss = self._sums.step(level.name, evaluate) if self.problem.ranks.several else evaluate()
        point = Point(self.problem, self.batches, self.generators, carryover=self.carryover)
        with point.generators_preserved():
            gradient = response.total_derivative(point, level.name, self.response_streams)
        for variable, derivative in zip(variables, gradient, strict=True):
            variable.grad = derivative
        self._keep_reports(point)
        return loss

    def _keep_reports(self, point: Point) -> None:
        self.reports |= point.reports
        for name, report in point.reports.items():
            if report.doubtful:
                self.doubts[name] = (self.doubts.get(name, (0, ""))[0] + 1, "; ".join(report.remarks))
                kinds = {(name, _NUMBER.sub("", remark)) for remark in report.remarks}
                if not kinds <= self._warned:
                    self._warned |= kinds
                    warnings.warn(
                        f"level {name!r}: {self.doubts[name][1]} (further such steps are counted at the end of the run)",
                        TrustWarning,
                        stacklevel=2,
                    )


def _not_finite(name: str) -> Callable[[float], str]:
    return lambda value: f"{name} is {value}"
