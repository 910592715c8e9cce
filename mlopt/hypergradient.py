"""Reverse accumulation over the graph of solutions: a level's total derivative, each level pulled back once."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import attrs
from torch import Tensor

from .errors import ProblemError, TrustWarning
from .finiteness import require_finite
from .problem import (
    Block,
    Estimator,
    FixedPoint,
    Level,
    Linearization,
    Objective,
    Point,
    Problem,
    Report,
    Stream,
    Workspace,
    add_into,
    call_solver,
    cloned_buffers,
    compare_evaluations,
    own_gradient,
    partial_derivatives,
    require_mean,
    restored,
    to_device,
)
from .rng import GeneratorState, derive_seed
from .tensors import Tensors, norm, zeros_like
from .validation import is_whole, require

__all__ = [
    "Hypergradient",
    "at_solutions",
    "hypergradient",
    "inspect_inside",
    "keep_reports",
    "pull_back",
    "report_doubts",
    "run_solvers",
    "seeded_generators",
    "standalone",
    "total_derivative",
]

#: The stationarity above which a level counts as unsolved although it has a solver of its own.
_UNSOLVED = 1e-2


@attrs.frozen(kw_only=True, eq=False)
class Hypergradient:
    """The total derivative of a level's objective with respect to its variables, solutions of inner levels included.

    Attributes:
        level: the level's name.
        gradient: the derivative by parameter name, in the shape of each parameter.
        loss: the objective, a scalar tensor without a graph.
        reports: the report on each level that was pulled back, by name.

    Example:
        >>> from mlopt.testing import logistic_regression
        >>> result = mlopt.hypergradient(logistic_regression(mlopt.Dense()).problem)
        >>> result.level, result.gradient["value"].shape, list(result.reports)
        ('weights', torch.Size([12]), ['regression'])
    """

    level: str
    gradient: dict[str, Tensor]
    loss: Tensor
    reports: dict[str, Report]


def hypergradient(
    problem: Problem,
    batches: Mapping[str, Any] | None = None,
    level: str | None = None,
    *,
    seed: int | None = None,
) -> Hypergradient:
    """Return the hypergradient of a level at the present point, without stepping.

    With x*(u) the solutions of the levels inside, d/du f(u, x*(u)) = f_u + sum over them of the pullback of f_x. The
    present variables are taken as the solutions, except that an `Unrolled` level first takes its virtual steps from there, and
    that a level with a solver of its own is first solved. If the level has a `response`, this rule forms the whole derivative,
    and its report has the name of the level. Nothing moves: parameters, buffers, optimisers, `.grad`, and the generators and
    data that training draws from are bit-identical afterwards.

    Args:
        problem: the problem; its modules hold the point.
        batches: the batch of each level by name; a missing one is the next batch of the level's data, from a stream that only
            calls of this function draw from.
        level: the level; the outermost if None.
        seed: seed of the random numbers that the losses draw (dropout, masks); if None, every call has its own. Two calls with
            the same seed and batches see the same numbers.

    Returns:
        The gradient by parameter name, the loss, and a report for each level pulled back.

    Raises:
        ArgumentError: `problem` or `seed` has a wrong type.
        ProblemError: `batches` names a level that does not exist.
        NonFiniteError: a loss, a gradient or a linear solve is not finite.

    Warns:
        TrustWarning: a report has a remark, and its solve did not converge.

    Example:
        >>> from mlopt.testing import logistic_regression
        >>> case = logistic_regression(mlopt.ConjugateGradient(iterations=10))
        >>> result = mlopt.hypergradient(case.problem)
        >>> case.error(result.gradient) < 1e-8, result.reports["regression"].converged
        (True, True)
    """
    require("hypergradient", "problem", problem, isinstance(problem, Problem), "an mlopt.Problem")
    require("hypergradient", "seed", seed, seed is None or is_whole(seed), "a whole number, or None")
    return standalone(problem, batches, level, seed, problem.workspace)


def standalone(
    problem: Problem,
    batches: Mapping[str, Any] | None,
    level: str | None,
    seed: int | None,
    workspace: Workspace,
    estimators: Mapping[str, Estimator] | None = None,
    *,
    solved: bool = False,
) -> Hypergradient:
    """Return the result of `hypergradient`, evaluated in a workspace, with estimators in place of the problem's.

    If `solved`, the present variables of levels that have solvers of their own are their solutions.
    """
    target = problem.outermost if level is None else problem[level]
    if target.residual is not None:
        raise ProblemError(f"level {target.name!r}: it has a residual and no loss, so it has no hypergradient")
    workspace.calls += 1
    batches = {name: to_device(batch, problem[name].device) for name, batch in (batches or {}).items()}
    response = target.response if estimators is None else None
    given = dict(batches)
    # A response draws the batches of the levels inside from streams.
    solver_levels = _inside_with_solvers(problem, target.name)
    evaluated = [problem[name] for name in (target.name, *solver_levels)] if response is not None else problem.levels
    batches |= {other.name: workspace.next_batch(other) for other in evaluated if other.name not in given}
    rules = {other.name: other.estimator for other in problem} | dict(estimators or {})
    curvature = {
        name: workspace.stream(problem[name], rule.curvature_data, "curvature data").take(rule.curvature_batches)
        for name in problem.graph[target.name].interior
        if response is None and (rule := rules[name]) is not None and rule.curvature_data is not None
    }
    chosen = ("call", workspace.calls) if seed is None else ("seed", seed)
    point = Point(
        problem,
        batches,
        seeded_generators(problem, *chosen),
        curvature_batches=curvature,
        workspace=workspace,
        estimators=estimators,
    )
    for other in evaluated if problem.ranks.several else ():
        with point.generators_preserved():
            point.generators[other.name].restore()
            require_mean(problem, other, batches[other.name])
    if response is None:
        with point.generators_preserved(), at_solutions(point, target, solved=solved):
            loss = Objective.of(target, point).value()
            cotangents = partial_derivatives(point, target, loss)
            gradient = total_derivative(point, target, cotangents)
    else:
        with point.generators_preserved():
            loss = _value_at_solvers(point, target, solver_levels)
            gradient = response.total_derivative(point, target.name, _streams(problem, given, workspace))
    for name, report in point.reports.items():
        if report.doubtful:
            warnings.warn(f"level {name!r}: {'; '.join(report.remarks)}", TrustWarning, stacklevel=3)
    named = dict(zip(target.parameter_names, gradient, strict=True))
    return Hypergradient(level=target.name, gradient=named, loss=loss.detach(), reports=point.reports)


def _value_at_solvers(point: Point, target: Level, solved: Sequence[str]) -> Tensor:
    """Return a level's objective with the levels that have solvers of their own at their solutions; raise if it is not finite."""
    with contextlib.ExitStack() as moved:
        for name in solved:
            moved.enter_context(_at_own_solution(point, point.problem[name]))
        loss = Objective.of(target, point).value().detach()
    require_finite((), lambda value: f"the loss of level {target.name!r} is {value}", size=loss)
    return loss


def _streams(problem: Problem, given: Mapping[str, Any], workspace: Workspace) -> dict[str, Stream]:
    """Return a stream for each inner level: its given batch, again and again, or a stream for standalone calls."""
    return {
        level.name: Stream(level.name, [given[level.name]], 0, level.device)
        if level.name in given
        else workspace.stream(level, level.data, "response")
        for level in problem.levels[1:]
    }


def seeded_generators(problem: Problem, *chosen: object) -> dict[str, GeneratorState]:
    """Return the state of the generators for each level in a call: ("seed", n) for a call of `hypergradient` at seed n."""
    devices = problem.devices
    return {
        level.name: GeneratorState.seeded(derive_seed("hypergradient", *chosen, level.name), devices)
        for level in problem
    }


@contextlib.contextmanager
def at_solutions(point: Point, level: Level, *, solved: bool = False) -> Iterator[None]:
    """Move the variables of the levels inside to the solutions that their estimators assume; restore them on exit.

    Each level is moved after those that its objective refers to. In a run, or if `solved`, levels with solvers of their own are
    already solved.
    """
    problem, solved = point.problem, solved or point.carryover is not None
    with contextlib.ExitStack() as moved:
        for part in reversed(problem.graph[level.name].parts):
            for name in () if solved else _with_solvers(problem, part):
                moved.enter_context(_at_own_solution(point, problem[name]))
            estimator = point.estimator(part)
            if estimator is not None and problem.graph[part].arguments:
                begin = time.perf_counter()
                moved.enter_context(estimator.at_solution(point, part))
                point.seconds[part] = time.perf_counter() - begin
        yield


def run_solvers(point: Point, level: Level, *, itself: bool = False) -> None:
    """Solve the levels inside that have solvers of their own. Variables and generators move; the caller restores them.

    Args:
        point: the point.
        level: the level.
        itself: True to solve the level as well, after those inside it, if it has a solver.
    """
    for name in (_with_solvers if itself else _inside_with_solvers)(point.problem, level.name):
        _run_solver(point, point.problem[name])


def _inside_with_solvers(problem: Problem, host: str) -> list[str]:
    """Return the levels inside a level that have solvers of their own, each after those that it depends on."""
    return [name for part in reversed(problem.graph[host].parts) for name in _with_solvers(problem, part)]


def _with_solvers(problem: Problem, part: str) -> list[str]:
    """Return the same, and the level itself if it has a solver."""
    inside = _inside_with_solvers(problem, part)
    return inside if problem[part].solver is None else [*inside, part]


@contextlib.contextmanager
def _at_own_solution(point: Point, level: Level) -> Iterator[None]:
    """Solve a level by its own solver; restore its variables on exit."""
    with restored(level.parameters):
        _run_solver(point, level)
        yield


def _run_solver(point: Point, level: Level) -> None:
    """Solve a level by its own solver, and keep its gradient there."""
    modules = {name: point.problem[name].module for name in (level.name, *level.references)}
    point.generators[level.name].restore()
    with cloned_buffers(modules.values()):
        call_solver(level, modules, point.batches[level.name], point.problem)
    point.gradients[level.name] = own_gradient(level, point)


def total_derivative(point: Point, level: Level, cotangents: Mapping[Block, Tensors]) -> Tensors:
    """Return the total derivative of a level's objective with respect to its variables.

    Each part of the level's interior is pulled back once, after all those that refer to it.

    Args:
        point: the point of linearisation.
        level: the level.
        cotangents: partial derivatives of its objective, by block.
    """
    problem, cotangents = point.problem, dict(cotangents)
    node = problem.graph[level.name]
    within = {level.name, *node.interior}
    for part in node.parts:
        if problem.graph[part].arguments:
            add_into(cotangents, pull_back(point, part, cotangents, within))
    inspect_inside(point, level)
    report_doubts(point)
    gradient = cotangents.get(level.name)
    if gradient is None:
        gradient = zeros_like(level.parameters)
    require_finite(gradient, lambda _: f"the total gradient of level {level.name!r} is not finite")
    return gradient


def pull_back(
    point: Point, part: str, cotangents: dict[Block, Tensors], within: Collection[str]
) -> dict[Block, Tensors]:
    """Return the pullback through the solution of one level, and leave its reports at the point.

    Args:
        point: the point of linearisation.
        part: the level.
        cotangents: by block; those on the blocks of the level are taken out.
        within: the arguments to return; the others are constant.

    Raises:
        NonFiniteError: the result is not finite.
    """
    estimator = point.estimator(part)
    assert estimator is not None
    begin = time.perf_counter()
    linearization = estimator.linearize(point, part)
    cotangent = {block: cotangents.pop(block) for block in linearization.blocks if block in cotangents}
    pulled = linearization.pullback(cotangent, [name for name in linearization.arguments if name in within])
    for block, vector in pulled.items():
        require_finite(vector, partial(_not_finite, part, block, estimator))
    linearization.report.seconds = time.perf_counter() - begin + point.seconds.get(part, 0.0)
    keep_reports(point, linearization)
    return pulled


def keep_reports(point: Point, linearization: Linearization) -> None:
    """Keep the reports of a linearisation at the point, with the distance of each level from its solution."""
    for name, report in linearization.reports().items():
        level = point.problem[name]
        _measure(point, level, report)
        if any(parameter._post_accumulate_grad_hooks for parameter in level.parameters):
            report.doubt(
                f"parameters of {name!r} have hooks that run when their gradient was accumulated "
                "(register_post_accumulate_grad_hook), which steps obey and pullbacks do not; mask gradients by register_hook, "
                "or freeze parts by requires_grad_(False)"
            )
        point.reports[name] = report


def _measure(point: Point, level: Level, report: Report) -> None:
    """Report how far a level is from its solution, unless its estimator did, or moved the level itself."""
    if (
        not report.is_measured
        and level.name not in point.ahead
        and (raw := point.last_gradient(level.name)) is not None
    ):
        gradient = FixedPoint.of(level, point).gradient(raw, level.name, point)
        report.measured(norm(gradient), norm([v.detach() for v in point.values[level.name]]))
    if level.solver is None or report.curvature is None:
        return
    distance, host = report.stationarity, point.problem.graph[level.name].host
    if distance is not None and distance > _UNSOLVED:
        since = ""
        if point.carryover is not None and host is not None and point.problem.responds(host):
            since = f", or {host!r} has moved since then; list it before {host!r} to solve it after {host!r}"
        report.doubt(
            f"its solver left it about {distance:.0%} of ||x|| away from a zero gradient, which the implicit derivative assumes: "
            f"it stopped early, or holds variables at a bound{since}"
        )


def inspect_inside(point: Point, level: Level) -> None:
    """Inspect the losses inside, once for each workspace; if products were compared with differences, also two evaluations."""
    verified, key = point.workspace.verified, ("inside", level.name)
    if key in verified:
        return
    compared = {check[2:4] for check in verified if check[0] == "products"}
    for name in point.problem.graph[level.name].interior:
        if name in point.generators and name in point.batches:
            for term in Objective.parts(point.problem[name], point):
                if (name, term.part) in compared:
                    compare_evaluations(term)
                elif (name, term.part) not in point.workspace.evaluations:
                    term.value()
    verified.add(key)


def report_doubts(point: Point) -> None:
    """Add the remarks on losses to the reports: of their level, or else of the level that they refer to.

    Also those on products of a level: the multiplier of a level outside takes some that no linearisation of its own reports.
    """
    for (check, first, second, *_), remark in point.workspace.doubts.items():
        names = (first, second) if check == "loss" else (second,)
        report = next((point.reports[name] for name in names if name in point.reports), None)
        if report is not None:
            report.doubt(remark)


def _not_finite(part: str, block: Block, estimator: Estimator, _: float) -> str:
    return (
        f"the cotangent on {block!r} from the pullback of level {part!r} by {estimator} is not finite: check how its loss "
        f"depends on {block!r}"
    )
