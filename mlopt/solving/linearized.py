"""A level's solution at one point, its derivative there, and the node of both in autograd's graph."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import EstimatorError, TrustWarning
from ..finiteness import immediate
from ..hypergradient import inspect_inside, keep_reports, pull_back, report_doubts, run_solvers, seeded_generators
from ..problem import Level, Point, Problem, Report, Stream, restored
from ..tensors import Tensors, zeros_like
from .engine import Engine

__all__ = ["LinearizedSolution", "refuse_transforms"]

_AGAIN = (
    "the derivative of a solution cannot be differentiated again; make the loss that depends on the solution a level of a "
    "Problem, whose levels may be nested"
)


def refuse_transforms(*tensors: Tensor) -> None:
    """Refuse the transforms of torch.func, whose tensors have no storage that a module could hold."""
    # torch has no public question for them. Batched gradients are tensors of an older vmap.
    functorch = torch._C._functorch
    if functorch.peek_interpreter_stack() is not None or any(map(functorch.is_legacy_batchedtensor, tensors)):
        raise EstimatorError(
            "a solution is not a function that torch.func (grad, jvp, vmap) or is_grads_batched can transform; use "
            "torch.autograd.grad, torch.autograd.forward_ad or torch.autograd.functional.jacobian, and a loop in place of vmap"
        )


class LinearizedSolution:
    """A level's solution at one u, and its derivative there.

    Args:
        problem: the problem.
        level: the level.
        batches: the given batches.
        steps: steps to take before.
        chosen: what the random numbers depend on.

    Attributes:
        reports: the reports of the latest derivative.
    """

    def __init__(
        self,
        problem: Problem,
        level: Level,
        batches: Mapping[str, Any],
        steps: int,
        chosen: tuple[str, int],
    ) -> None:
        self._problem, self._level, self._count = problem, level, steps
        self._workspace = problem.workspace
        node = problem.graph[level.name]
        self._arguments, self._solved = node.arguments, (level.name, *node.interior)
        self._generators = seeded_generators(problem, *chosen)
        self._batches = dict(batches)
        self._curvature: dict[str, Any] = {}
        #: By level, the values at which the solution is linearised.
        self._values: dict[str, Tensors] = {}
        self._gradients: dict[str, Tensors] = {}
        self.reports: dict[str, Report] = {}
        #: True once forward mode has gone through the solution.
        self._pushed = False
        kind = level.device.type
        #: The autocast region of the call. A backward pass may run in another.
        self._region = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    def tensors(self, inputs: Sequence[Tensor]) -> Tensors:
        """Return the solution at u, with a node in autograd's graph."""
        solved: Tensors = _Solve.apply(self, *inputs)  # type: ignore[no-untyped-call]
        return solved

    def solve(self, inputs: Sequence[Tensor]) -> Tensors:
        """Return the solution at u, without a graph."""
        self._values = {name: _clones(own) for name, own in self._cut(inputs).items()}
        level, present = self._level, {name: self._problem[name].parameters for name in self._solved}
        with self._placed(), contextlib.ExitStack() as moved:
            for own in present.values():
                moved.enter_context(restored(own))
            if self._count:
                moved.enter_context(self._stepped())
            self._draw_batches()
            point = self._point()
            with point.generators_preserved():
                run_solvers(point, level, itself=True)
                self._gradients = point.gradients
                self._values |= {name: _clones(own) for name, own in present.items()}
                estimator = point.estimator(level.name)
                assert estimator is not None
                with estimator.at_solution(point, level.name):
                    return _clones(level.parameters)

    def pullback(self, cotangent: Tensors, needed: Sequence[bool]) -> list[Tensor | None]:
        """Return (dx*/du)^T x_bar for the inputs that are needed."""
        refuse_transforms(*cotangent)
        self._refuse_tangents(cotangent)
        wanted = [name for name, flags in self._cut(needed).items() if any(flags)]
        with self._linearizing() as point:
            pulled = pull_back(
                point, self._level.name, {self._level.name: tuple(x.detach() for x in cotangent)}, wanted
            )
        zeros = {name: zeros_like(self._values[name]) for name in self._arguments}
        flat = [x for name in self._arguments for x in pulled.get(name, zeros[name])]
        return [x.to(like) if need else None for x, like, need in zip(flat, self._inputs(), needed, strict=True)]

    def pushforward(self, tangents: Sequence[Tensor | None]) -> Tensors:
        """Return (dx*/du) u_dot; a tangent that is None is zero."""
        self._pushed = True
        filled = [
            torch.zeros_like(x) if t is None else t.detach() for t, x in zip(tangents, self._inputs(), strict=True)
        ]
        with self._linearizing() as point:
            estimator = point.estimator(self._level.name)
            assert estimator is not None
            if getattr(estimator, "products", None) == "forward":
                raise EstimatorError(
                    f"level {self._level.name!r}: {estimator} in forward mode, which torch does not nest; use products='autograd'"
                )
            linearization = estimator.linearize(point, self._level.name)
            push = getattr(linearization, "pushforward", None)
            if push is None:
                raise EstimatorError(
                    f"level {self._level.name!r}: {estimator} has no pushforward, which forward mode needs; use reverse mode, "
                    "or an estimator with a linear solver, such as mlopt.ConjugateGradient(iterations=10)"
                )
            moved = push(self._cut(filled)).get(self._level.name)
            keep_reports(point, linearization)
        return _clones(zeros_like(self._level.parameters) if moved is None else moved)

    def _refuse_tangents(self, cotangent: Tensors) -> None:
        """Refuse reverse mode inside forward mode, in which the tangent of the derivative would lack that of the solve."""
        # torch has no public question for the present level of forward mode.
        if forward_ad._current_level < 0:
            return
        duals = [forward_ad.unpack_dual(x) for x in cotangent]  # type: ignore[no-untyped-call]
        if self._pushed or any(dual.tangent is not None for dual in duals):
            raise EstimatorError(_AGAIN)

    @contextlib.contextmanager
    def _linearizing(self) -> Iterator[Point]:
        """Yield the point of the solution; keep and warn of the reports on exit."""
        kind, dtype, enabled = self._region
        with self._placed(), torch.autocast(kind, dtype=dtype, enabled=enabled):
            point = self._point()
            with point.generators_preserved():
                estimator = point.estimator(self._level.name)
                assert estimator is not None
                with estimator.at_solution(point, self._level.name):
                    yield point
                    inspect_inside(point, self._level)
                    report_doubts(point)
        self.reports.clear()
        self.reports.update(point.reports)
        for name, report in point.reports.items():
            if report.doubtful:
                warnings.warn(f"level {name!r}: {'; '.join(report.remarks)}", TrustWarning, stacklevel=3)

    def _point(self) -> Point:
        point = Point(
            self._problem,
            self._batches,
            self._generators,
            curvature_batches=self._curvature,
        )
        point.gradients.update(self._gradients)
        return point

    @contextlib.contextmanager
    def _placed(self) -> Iterator[None]:
        """Set the live variables to the values that are known; restore them on exit."""
        with contextlib.ExitStack() as stack, torch.enable_grad():
            stack.enter_context(self._alone())
            for name, own in self._values.items():
                live = self._problem[name].parameters
                stack.enter_context(restored(live))
                torch._foreach_copy_([variable.data for variable in live], list(own))
            yield

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Refuse other threads until exit: they would move the same variables."""
        here, busy = threading.get_ident(), self._workspace.busy
        if busy.setdefault("thread", here) != here:
            raise EstimatorError(
                f"level {self._level.name!r} is being solved or differentiated in another thread, which moves the variables of "
                "its module meanwhile; give each thread a copy of the level or the problem (copy.deepcopy)"
            )
        busy["depth"] = busy.get("depth", 0) + 1
        try:
            yield
        finally:
            busy["depth"] -= 1
            if not busy["depth"]:
                busy.clear()

    @contextlib.contextmanager
    def _stepped(self) -> Iterator[None]:
        """Take the steps; undo them on exit."""
        engine = Engine(self._problem, 0, aside=True)
        given, names = self._batches, self._solved
        streams = {
            name: Stream(name, [given[name]], 0, self._problem[name].device)
            if name in given
            else self._workspace.stream(self._problem[name], self._problem[name].data, "response")
            for name in names
        }
        point = self._point()
        with engine.rolled_back():
            with point.generators_preserved(), immediate(), contextlib.ExitStack() as stack:
                served = {name: stack.enter_context(stream.recording()) for name, stream in streams.items()}
                self._generators[self._level.name].restore()
                engine.rehearsal(streams).solve_level(self._level, self._count)
            # The derivative is that on the batches of the last step.
            self._batches |= {name: batches[-1] for name, batches in served.items() if batches}
            yield

    def _draw_batches(self) -> None:
        """Draw the batches that are not known yet."""
        for name in self._solved:
            level = self._problem[name]
            if name not in self._batches:
                self._batches[name] = self._workspace.next_batch(level)
            rule = level.estimator
            if rule is not None and rule.curvature_data is not None:
                stream = self._workspace.stream(level, rule.curvature_data, "curvature data")
                self._curvature[name] = stream.take(rule.curvature_batches)

    def _inputs(self) -> Tensors:
        return tuple(x for name in self._arguments for x in self._values[name])

    def _cut(self, flat: Sequence[Any]) -> dict[str, tuple[Any, ...]]:
        """Cut a sequence with an entry for each input into levels."""
        rest = iter(flat)
        return {name: tuple(next(rest) for _ in self._problem[name].parameters) for name in self._arguments}


def _clones(tensors: Sequence[Tensor]) -> Tensors:
    return tuple(x.detach().clone() for x in tensors)


class _Solve(torch.autograd.Function):
    """The node of a solution in autograd's graph."""

    @staticmethod
    def forward(solution: LinearizedSolution, *inputs: Tensor) -> Tensors:
        return solution.solve(inputs)

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        context.solution = inputs[0]
        context.save_for_backward(*inputs[1:])
        context.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(context: Any, *cotangent: Tensor) -> tuple[Any, ...]:
        pulled = context.solution.pullback(cotangent, context.needs_input_grad[1:])
        if torch.is_grad_enabled():
            # torch's once_differentiable takes a derivative for constant if the cotangent is.
            return None, *_Once.apply(len(pulled), *pulled, *context.saved_tensors, *cotangent)  # type: ignore[no-untyped-call]
        return None, *pulled

    @staticmethod
    def jvp(context: Any, *tangents: Any) -> Tensors:
        pushed: Tensors = context.solution.pushforward(tangents[1:])
        if torch.is_grad_enabled():
            pushed = _Once.apply(len(pushed), *pushed, *context.saved_tensors, *tangents[1:])  # type: ignore[no-untyped-call]
        return pushed


class _Once(torch.autograd.Function):
    """Return the first tensors; refuse to differentiate them by the others."""

    @staticmethod
    def forward(context: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tensors[:count]

    @staticmethod
    def backward(context: Any, *cotangent: Tensor) -> tuple[Any, ...]:
        raise EstimatorError(_AGAIN)
