"""Calls of the solver that a level provides in place of an optimiser."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import ProblemError
from .batch import copied, versions
from .inspection import reading_refused, require_unchanged
from .level import Level
from .problem import Problem

__all__ = ["call_solver"]


def call_solver(level: Level, modules: Mapping[str, nn.Module], batch: Any, problem: Problem) -> None:
    """Let the solver of a level move its variables. Every call of a solver in the library is made by this function.

    Args:
        level: a level with a solver.
        modules: by name, the level's module and those of the levels that its solver refers to. Their `.grad` is as before
            afterwards, although a solver may use it.
        batch: the batch to solve on. The solver receives a copy of its containers.
        problem: the problem; at the first call, its other levels must not be read.

    Raises:
        ProblemError: the solver returned a value, replaced parameters of the module, changed a tensor of the batch in place, or
            uses variables of a level that the loss does not refer to.
    """
    assert level.solver is not None
    before = level.parameters
    tensors: list[Tensor] = []
    batch = copied(batch, tensors)
    kept, verified, key = versions(tensors), problem.workspace.verified, ("solver", level.name)
    with (
        _gradients_preserved(modules.values()),
        contextlib.nullcontext() if key in verified else reading_refused(level, problem),
    ):
        returned = level.solver(modules[level.name], batch, **{name: modules[name] for name in level.solver_references})
    verified.add(key)
    require_unchanged(level, "solver", tensors, kept)
    if returned is not None:
        raise ProblemError(
            f"the solver of level {level.name!r} returned a {type(returned).__name__}; it must move the variables of its module "
            "in place, such as by module.weight.data.copy_(solution), and return nothing"
        )
    after = level.parameters
    if len(after) != len(before) or any(a is not b for a, b in zip(after, before, strict=True)):
        raise ProblemError(
            f"the solver of level {level.name!r} replaced, froze or unfroze parameters of its module; it must move them in "
            "place, such as by module.weight.data.copy_(solution)"
        )
    # Every process solves on the whole batch; threads may round differently.
    problem.ranks.give(variable.data for variable in after)


@contextlib.contextmanager
def _gradients_preserved(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let `.grad` of all parameters be None inside the context, and as before afterwards."""
    kept = [(parameter, parameter.grad) for module in modules for parameter in module.parameters()]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient
