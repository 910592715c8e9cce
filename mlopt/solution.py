"""The solution of a level as tensors that autograd differentiates."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.optim import SGD

from .errors import ArgumentError
from .problem import Level, Problem, Report, Workspace, to_device, variables
from .solving.linearized import LinearizedSolution, refuse_transforms
from .tensors import Tensors
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
        ('y', ['weight', 'shift'])
    """

    level: str
    variables: dict[str, Tensor]
    reports: dict[str, Report]


# torch.compile leaves the call as it is, between the graphs that it makes of the code around it.
@torch._disable_dynamo  # type: ignore[attr-defined]
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
        EstimatorError: in forward mode, the level's estimator has no pushforward; or a derivative is differentiated again; or
            torch.func transforms the call, or another thread is in a call on the same problem.
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
    refuse_transforms()
    if torch.is_inference_mode_enabled():  # its tensors have no versions, and a derivative inside the solve needs them
        with torch.inference_mode(False), torch.no_grad():
            return solution(problem, level, values=values, batches=batches, steps=steps, seed=seed)
    require("solution", "problem", problem, isinstance(problem, Problem | Level), "an mlopt.Problem or an mlopt.Level")
    require("solution", "seed", seed, seed is None or is_whole(seed), "a whole number, or None")
    require("solution", "steps", steps, steps is None or is_whole(steps, 0), "a whole number >= 0, or None")
    values = dict(values or {})
    if isinstance(problem, Level):
        require("solution", "level", level, level in (None, problem.name), "None: the first argument is the level")
        name, alone = problem.name, _alone(problem, values)
        alone.workspace = _WORKSPACES.setdefault(problem, alone.workspace)
        problem = alone
    else:
        require("solution", "level", level, isinstance(level, str), f"one of {', '.join(x.name for x in problem)}")
        name = problem[str(level)].name
    problem.ranks.refuse("solution")
    inputs = _inputs(problem, name, values)
    steps = _steps(problem[name], steps, values)
    problem.workspace.calls += 1
    chosen = ("call", problem.workspace.calls) if seed is None else ("seed", seed)
    batches = {key: to_device(batch, problem[key].device) for key, batch in (batches or {}).items()}
    linearized = LinearizedSolution(problem, problem[name], batches, steps, chosen)
    solved = linearized.tensors([x for own in inputs.values() for x in own])
    return LevelSolution(
        level=name,
        variables=dict(zip(problem[name].parameter_names, solved, strict=True)),
        reports=linearized.reports,
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
        floating = isinstance(given, Tensor) and given.is_floating_point()
        require("solution", f"values[{name!r}]", given, floating, "a tensor of a floating dtype")
    frozen = partial(SGD, lr=0.0)  # an engine asks each level for an optimiser; only `level` takes steps
    outside = [
        Level(name, variables(values[name]), _refers_to(*[level.name] * (name == names[0])), optimizer=frozen)  # type: ignore[arg-type]
        for name in names
    ]
    return Problem(*outside, level, group=None)


def _refers_to(*references: str) -> Any:
    """Return a loss that names these levels; it is not evaluated."""

    def loss(module: Any, batch: Any) -> Tensor:
        return torch.zeros(())

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
