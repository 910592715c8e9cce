"""The solution of a level as tensors that autograd differentiates."""

from __future__ import annotations

import contextlib
import inspect
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.optim import SGD

from .errors import ArgumentError, EstimatorError, TrustWarning
from .finiteness import immediate
from .hypergradient import inspect_inside, keep_reports, pull_back, report_doubts, run_solvers, seeded_generators
from .problem import Level, Point, Problem, Report, Stream, Workspace, restored, to_device, variables
from .solving.engine import Engine
from .tensors import Tensors, zeros_like
from .validation import is_whole, require

__all__ = ["LevelSolution", "solution"]

Values = Tensor | Mapping[str, Tensor]

#: The caches of levels that were solved without a problem. (A problem has its own.)
_WORKSPACES: weakref.WeakKeyDictionary[Level, Workspace] = weakref.WeakKeyDictionary()


@attrs.frozen(kw_only=True, eq=False)
class LevelSolution:
    """A level's solution x*(u) at one u.

    Attributes:
        level: the level's name.
        variables: x* by parameter name, in the shape of each parameter; differentiable functions of u.
        reports: the report on each level that the latest derivative went through, by name; empty before the first derivative.

    Example:
        >>> from mlopt.testing import quadratic
        >>> solved = mlopt.solution(quadratic("two", mlopt.Dense()).problem, "y")
        >>> solved.level, list(solved.variables)
        ('y', ['value'])
    """

    level: str
    variables: dict[str, Tensor]
    reports: dict[str, Report]


def solution(
    problem: Problem | Level,
    level: str | None = None,
    *,
    values: Mapping[str, Values] | None = None,
    batches: Mapping[str, Any] | None = None,
    steps: int | None = None,
    seed: int | None = None,
) -> LevelSolution:
    """Return a level's solution x*(u) as tensors of torch's autograd, so that it can be a layer of a model.

    u are the variables of the levels that the solution depends on: the live parameters of their modules, or `values`. Reverse
    mode multiplies with (dx*/du)^T by the pullback of the level's estimator, forward mode with dx*/du by its pushforward:

        u_bar = -(d2f / du dx) q,  (d2f / dx2) q = x_bar

    A level with a solver of its own is solved at u. Otherwise its present variables, or where `steps` of its optimiser lead from
    there, are taken as the solution. Nothing moves: variables, buffers, optimisers, `.grad` and generators are bit-identical
    afterwards. A derivative is formed at the u and the batches of this call, also if modules have moved since; it needs no
    graph of the solver or of the steps.

    Args:
        problem: a problem; or a single level, whose references must all have `values`.
        level: the level in the problem that is solved.
        values: by level, in place of the live variables: a tensor for a level with one variable, else tensors by parameter name.
            They may have graphs: outputs of other layers, or the solution of another level.
        batches: the batch of each level by name; a missing one is the next batch of the level's data, from a stream that only
            calls outside runs draw from.
        steps: steps that the level takes before, from its present variables with an optimiser without state. It must be given
            if `values` are and the level has an optimizer: 0 takes the present variables as they are.
        seed: seed of the random numbers that the losses draw; if None, every call has its own.

    Returns:
        The solution, and reports once it has been differentiated.

    Raises:
        ArgumentError: an argument is invalid, or `values` do not fit the variables.
        EstimatorError: in forward mode, the level's estimator has no pushforward.
        NonFiniteError: a loss, a gradient or a linear solve is not finite.
        ProblemError: there is no such level, or no batch of it.

    Warns:
        TrustWarning: in a derivative, a report has a remark, and its solve did not converge.

    Example:
        Ridge regression as a layer: w*(penalty) = argmin_w ||X w - y||^2 + penalty ||w||^2.

        >>> def loss(module, batch, *, penalty):
        ...     inputs, targets = batch
        ...     return (inputs @ module() - targets).square().sum() + penalty() * module().square().sum()
        >>> def solver(module, batch, *, penalty):
        ...     inputs, targets = batch
        ...     matrix = inputs.T @ inputs + penalty().detach() * torch.eye(2)
        ...     module.value.data.copy_(torch.linalg.solve(matrix, inputs.T @ targets))
        >>> ridge = mlopt.Level(
        ...     "weights", mlopt.variables(torch.zeros(2)), loss, solver=solver, estimator=mlopt.Dense(),
        ...     data=[(torch.eye(2), torch.ones(2))],
        ... )
        >>> penalty = torch.tensor(1.0, requires_grad=True)
        >>> weights = mlopt.solution(ridge, values={"penalty": penalty}).variables["value"]
        >>> weights.sum().backward()
        >>> weights.detach(), penalty.grad  # of 2 / (1 + penalty)
        (tensor([0.5000, 0.5000]), tensor(-0.5000))

    Source: Amos & Kolter 2017 (arXiv 1703.00443); Blondel et al. 2022 (arXiv 2105.15183).
    """
    require("solution", "problem", problem, isinstance(problem, Problem | Level), "an mlopt.Problem or an mlopt.Level")
    require("solution", "seed", seed, seed is None or is_whole(seed), "a whole number, or None")
    require("solution", "steps", steps, steps is None or is_whole(steps, 0), "a whole number >= 0, or None")
    values = dict(values or {})
    if isinstance(problem, Level):
        require("solution", "level", level, level in (None, problem.name), "None: the first argument is the level")
        name, workspace = problem.name, _WORKSPACES.setdefault(problem, Workspace())
        problem = _alone(problem, values)
    else:
        require("solution", "level", level, isinstance(level, str), f"one of {', '.join(x.name for x in problem)}")
        name, workspace = problem[str(level)].name, problem.workspace
    inputs = _inputs(problem, name, values)
    steps = _steps(problem[name], steps, values)
    workspace.calls += 1
    chosen = ("call", workspace.calls) if seed is None else ("seed", seed)
    batches = {key: to_device(batch, problem[key].device) for key, batch in (batches or {}).items()}
    evaluation = _Evaluation(problem, problem[name], workspace, batches, steps, chosen)
    solved = _Solve.apply(evaluation, *(x for own in inputs.values() for x in own))  # type: ignore[no-untyped-call]
    return LevelSolution(
        level=name,
        variables=dict(zip(problem[name].parameter_names, solved, strict=True)),
        reports=evaluation.reports,
    )


def _alone(level: Level, values: Mapping[str, Values]) -> Problem:
    """Return a problem of a level and, for each of its references, a level of variables at the given value."""
    names = level.references
    if not names:
        raise ArgumentError(
            f"solution: level {level.name!r} refers to no other level, so its solution is constant; call its solver yourself"
        )
    for name in names:
        given = values.get(name)
        require("solution", f"values[{name!r}]", given, isinstance(given, Tensor), "a tensor")
    frozen = partial(SGD, lr=0.0)  # an engine asks each level for an optimiser; only `level` takes steps
    outside = [
        Level(name, variables(values[name]), _refers_to(*[level.name] * (name == names[0])), optimizer=frozen)  # type: ignore[arg-type]
        for name in names
    ]
    return Problem(*outside, level)


def _refers_to(*references: str) -> Any:
    """Return a loss that names these levels, and is never evaluated."""

    def loss(module: Any, batch: Any) -> Tensor:
        raise AssertionError("the levels outside are constants")

    kinds = inspect.Parameter
    parameters = [kinds(name, kinds.POSITIONAL_OR_KEYWORD) for name in ("module", "batch")]
    parameters += [kinds(name, kinds.KEYWORD_ONLY) for name in references]
    loss.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return loss


def _inputs(problem: Problem, name: str, values: Mapping[str, Values]) -> dict[str, Tensors]:
    """Return u by level: the given values, or the live variables."""
    arguments = problem.graph[name].arguments
    if problem[name] is problem.outermost or not arguments:
        raise ArgumentError(f"solution: level={name!r}, whose solution depends on no other level")
    for given in values:
        if given not in arguments:
            raise ArgumentError(
                f"solution: values[{given!r}], but the solution of {name!r} depends on {', '.join(arguments)}"
            )
    return {
        argument: _fitting(problem[argument], values[argument]) if argument in values else problem[argument].parameters
        for argument in arguments
    }


def _fitting(level: Level, given: Values) -> Tensors:
    """Return the values of a level's variables in their order."""
    names = level.parameter_names
    if isinstance(given, Tensor) and len(names) == 1:
        given = {names[0]: given}
    label = f"solution: values[{level.name!r}]"
    if not isinstance(given, Mapping) or set(given) != set(names):
        shown = f"has {', '.join(map(str, given))}" if isinstance(given, Mapping) else f"is a {type(given).__name__}"
        raise ArgumentError(f"{label} {shown}; it must be tensors by parameter name: {', '.join(names)}")
    for name, variable in zip(names, level.parameters, strict=True):
        value = given[name]
        if not isinstance(value, Tensor) or value.shape != variable.shape or value.dtype != variable.dtype:
            shown = f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise ArgumentError(f"{label}: {name!r} is {shown}, not {tuple(variable.shape)} of {variable.dtype}")
    return tuple(given[name] for name in names)


def _steps(level: Level, steps: int | None, values: Mapping[str, Values]) -> int:
    """Return the number of steps to take before."""
    if level.solver is not None:
        if steps:
            raise ArgumentError(f"solution: steps={steps}, but level {level.name!r} has a solver; leave them out")
        return 0
    if steps is None and values:
        raise ArgumentError(
            f"solution: level {level.name!r} has an optimizer, and its present variables need not solve it at the given values; "
            "pass steps (0 takes the present variables as they are), or give the level a solver"
        )
    return steps or 0


class _Evaluation:
    """A level's solution at one u, and its derivative there.

    Args:
        problem: the problem.
        level: the level.
        workspace: caches.
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
        workspace: Workspace,
        batches: Mapping[str, Any],
        steps: int,
        chosen: tuple[str, int],
    ) -> None:
        self._problem, self._level, self._workspace, self._count = problem, level, workspace, steps
        node = problem.graph[level.name]
        self._arguments, self._solved = node.arguments, (level.name, *node.interior)
        self._generators = seeded_generators(problem, *chosen)
        self._batches = dict(batches)
        self._curvature: dict[str, Any] = {}
        #: By level, the values at which the solution is linearised.
        self._values: dict[str, Tensors] = {}
        self._gradients: dict[str, Tensors] = {}
        self.reports: dict[str, Report] = {}

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
        wanted = [name for name, flags in self._cut(needed).items() if any(flags)]
        with self._linearizing() as point:
            pulled = pull_back(point, self._level.name, {self._level.name: cotangent}, wanted)
        zeros = {name: zeros_like(self._values[name]) for name in self._arguments}
        flat = [x for name in self._arguments for x in pulled.get(name, zeros[name])]
        return [x.to(like) if need else None for x, like, need in zip(flat, self._inputs(), needed, strict=True)]

    def pushforward(self, tangents: Sequence[Tensor | None]) -> Tensors:
        """Return (dx*/du) u_dot; a tangent that is None is zero."""
        filled = [torch.zeros_like(x) if t is None else t for t, x in zip(tangents, self._inputs(), strict=True)]
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

    @contextlib.contextmanager
    def _linearizing(self) -> Iterator[Point]:
        """Yield the point of the solution; keep and warn of the reports on exit."""
        with self._placed():
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
            workspace=self._workspace,
        )
        point.gradients.update(self._gradients)
        return point

    @contextlib.contextmanager
    def _placed(self) -> Iterator[None]:
        """Set the live variables to the values that are known; restore them on exit."""
        with contextlib.ExitStack() as stack, torch.enable_grad():
            for name, own in self._values.items():
                live = self._problem[name].parameters
                stack.enter_context(restored(live))
                torch._foreach_copy_([variable.data for variable in live], list(own))
            yield

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
                self._batches[name] = self._workspace.next_batch(level, level.data)
            if level.estimator is not None and level.estimator.curvature_data is not None:
                data = level.estimator.curvature_data
                self._curvature[name] = self._workspace.next_batch(level, data, "curvature data")

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
    def forward(evaluation: _Evaluation, *inputs: Tensor) -> Tensors:
        return evaluation.solve(inputs)

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        context.evaluation = inputs[0]
        context.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(context: Any, *cotangent: Tensor) -> tuple[Any, ...]:
        pulled = context.evaluation.pullback(cotangent, context.needs_input_grad[1:])
        if torch.is_grad_enabled():
            # torch's once_differentiable takes a derivative for constant if the cotangent is.
            return None, *_Once.apply(len(pulled), *pulled, *context.saved_tensors, *cotangent)  # type: ignore[no-untyped-call]
        return None, *pulled

    @staticmethod
    def jvp(context: Any, *tangents: Any) -> Tensors:
        pushed: Tensors = context.evaluation.pushforward(tangents[1:])
        return pushed


class _Once(torch.autograd.Function):
    """Return the first tensors; refuse to differentiate them by the others."""

    @staticmethod
    def forward(context: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tensors[:count]

    @staticmethod
    def backward(context: Any, *cotangent: Tensor) -> tuple[Any, ...]:
        raise EstimatorError(
            "the derivative of a solution cannot be differentiated again; make the loss that depends on the solution a level of "
            "a Problem, whose levels may be nested"
        )
