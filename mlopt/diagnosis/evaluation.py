"""Parts that check and diagnose share: fixed batches, restored variables, evaluation, plain text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console, RenderableType

from ..hypergradient import total_derivative
from ..problem import (
    FixedPoint,
    Level,
    Objective,
    Point,
    Problem,
    Stream,
    own_gradient,
    partial_derivatives,
    restored,
    to_device,
)
from ..rng import derive_seed
from ..tensors import Tensors, norm

__all__ = ["evaluate", "fixed_batches", "put_back", "rendered"]


def fixed_batches(problem: Problem, batches: Mapping[str, Any] | None, seed: int) -> dict[str, Any]:
    """Return a batch for each level: the given one, else the first of its data in the order of the seed.

    Raises:
        ProblemError: `batches` names a level that does not exist.
    """
    fixed = {name: to_device(batch, problem[name].device) for name, batch in (batches or {}).items()}
    for level in problem:
        if level.name in fixed:
            continue
        fixed[level.name] = Stream(level.name, level.data, derive_seed("diagnosis", seed), level.device).next()
    return fixed


@contextlib.contextmanager
def put_back(problem: Problem) -> Iterator[None]:
    """Restore the variables of every level on exit, from copies."""
    with restored(tuple(variable for level in problem for variable in level.parameters)):
        yield


def evaluate(point: Point, level: Level) -> tuple[float, Tensors]:
    """Return what the steps of a level minimise at a point, and its total gradient, in the shapes of its variables.

    For a level with a residual, return the norm of that, and the residual itself, decay included.
    """
    if level.residual is not None:
        gradient = FixedPoint.of(level, point).gradient(own_gradient(level, point), level.name, point)
        return float(norm(gradient)), gradient
    value = Objective.minimized(level, point).value()
    gradient = total_derivative(point, level, partial_derivatives(point, level, value))
    return float(value.detach()), gradient


def rendered(renderable: RenderableType, width: int = 130) -> str:
    """Return the output of rich as plain text."""
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())
