"""An oracle independent of estimators: outer values with the levels inside solved again at displaced variables."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor

from ..errors import EstimatorError, NonFiniteError
from ..estimators import GMRES, Condition, ConjugateGradient, Implicit
from ..hypergradient import run_solvers, seeded_generators
from ..problem import Bounds, Level, Objective, Point, Problem, Workspace
from ..tensors import Tensors, flatten, norm, unflatten
from .evaluation import evaluate, put_back
from .minimize import minimize
from .root import find_root

__all__ = ["Resolver"]

#: Norm of the gradient, relative to one plus that of the variables, at which a level counts as solved.
_SOLVED = {torch.float64: 1e-12, torch.float32: 1e-6}
#: Factor on that norm for a level with others inside; its gradient inherits the errors of their solutions.
_NESTED = 1e2
#: Displacement of the outer variables, relative to one plus their norm. The error of the extrapolated differences is its
#: fourth power, and the error of the inner solves is divided by it.
_STEP = {torch.float64: 2e-3, torch.float32: 3e-2}
#: Relative error of a difference above which a shorter step is tried for small variables, and the smallest size tried.
_ROUGH, _SMALLEST = 1e-2, 1e-8


@attrs.frozen
class _Extrapolated:
    """A derivative, its error, and the share of the initial gradient that the solves for it left."""

    value: float
    error: float
    unsolved: float

    @property
    def rough(self) -> bool:
        return self.error > _ROUGH * abs(self.value) or self.unsolved > _ROUGH


class Resolver:
    """Solver of the levels inside a level, repeatedly, at one batch and one state of the generators.

    A level with a residual is solved by Newton's method, any other by L-BFGS. A level with others inside is solved by its total
    gradient: every evaluation solves those inside it again. The variables of the modules and the generators move; the caller
    restores them.

    Args:
        problem: the problem; its own estimators only determine the kind of products.
        batches: the batch of every level.
        target: the level whose objective is differentiated.
        seed: seed of the draws of the losses: the same draws as in `hypergradient` at this seed.
    """

    def __init__(self, problem: Problem, batches: Mapping[str, Any], target: str, seed: int) -> None:
        exact = {level.name: _exact(level) for level in problem if problem.responds(level.name)}
        self._problem, self._target = problem, problem[target]
        generators = seeded_generators(problem, "seed", seed)
        self._exact = exact
        self._point = Point(problem, batches, generators, workspace=Workspace(), estimators=exact)
        self._bounds: dict[str, Bounds] = {}
        #: The norm of each level's gradient at the end of its latest solve.
        self.reached: dict[str, float] = {}
        #: The largest share of the initial gradient that a solve which did not converge left.
        self.unsolved = 0.0

    def solve_inside(self, name: str) -> None:
        """Solve the levels that the objective of `name` depends on, dependencies first."""
        graph = self._problem.graph
        for part in reversed(graph[name].parts):
            if graph[part].arguments:
                self._solve(self._problem[part])

    def _solve(self, level: Level) -> None:
        variables = [variable.data for variable in level.parameters]
        nested = bool(self._problem.graph[level.name].parts)

        bounds = self._bounds_of(level)

        def objective(flat: Tensor) -> tuple[float, Tensor]:
            _write(variables, flat)
            self.solve_inside(level.name)
            value, gradient = evaluate(self._point, level)
            return value, flatten(bounds.on_free(gradient))

        def newton(flat: Tensor) -> Tensor:
            rule = self._exact[level.name].linearize(self._point, level.name)
            assert isinstance(rule, Condition)
            return flatten(rule.respond(bounds.on_free(evaluate(self._point, level)[1])))

        start = flatten(variables).clone()
        before = float(objective(start)[1].norm())
        tolerance = _SOLVED.get(start.dtype, 1e-3) * (1.0 + float(start.norm())) * (_NESTED if nested else 1.0)
        if level.residual is None:
            minimum = minimize(objective, start, tolerance=tolerance)
        else:
            minimum = find_root(lambda flat: objective(flat)[1], newton, start, tolerance=tolerance)
        _write(variables, minimum.variables)
        self.solve_inside(level.name)
        self.reached[level.name] = minimum.gradient_norm
        if level.name in self._problem.graph[self._target.name].parts and minimum.gradient_norm > tolerance:
            self.unsolved = max(self.unsolved, minimum.gradient_norm / before)

    def _bounds_of(self, level: Level) -> Bounds:
        """Return the bounds at which the level's optimiser holds variables at the first call; they stay there."""
        if level.name not in self._bounds:
            self._bounds[level.name] = Bounds.of(level, self._point, partial(self._gradient, level))
        return self._bounds[level.name]

    def require_bounds(self) -> None:
        """Raise unless each level that was solved is within its bounds, and is held where its first point is.

        Raises:
            EstimatorError: the solution passes a bound, or leaves one at which the first point is held.
        """
        for name, before in self._bounds.items():
            level = self._problem[name]
            now = Bounds.of(level, self._point, partial(self._gradient, level)).free
            free = now or tuple(map(torch.ones_like, before.free))
            released = sum(int((f > b).sum()) for f, b in zip(free, before.free, strict=True)) if before.free else 0
            if count := released + Bounds.passed(level, self._point):
                raise EstimatorError(
                    f"check_hypergradient: the optimiser of level {name!r} would hold other variables at a bound at its solution "
                    f"than at this point ({count} of them), so the 'resolve' oracle does not apply here; take more steps first, "
                    "or use oracle='dense'"
                )

    def _gradient(self, level: Level) -> Tensors:
        return evaluate(self._point, level)[1]

    def run_solvers(self) -> None:
        """Move the levels inside that have solvers of their own to where these take the solutions to be."""
        run_solvers(self._point, self._target)

    def gradient_norms(self) -> dict[str, float]:
        """Return, for each level that `solve_inside` would solve, the norm of its total gradient at the present variables.

        Variables held at a bound are left out.
        """
        graph, norms = self._problem.graph, {}
        pending = list(graph[self._target.name].parts)
        while pending:
            name = pending.pop(0)
            pending.extend(graph[name].parts)
            if graph[name].arguments:
                level = self._problem[name]
                norms[name] = float(norm(self._bounds_of(level).on_free(evaluate(self._point, level)[1])))
        return norms

    def derivative(self, direction: Tensor) -> tuple[float, float]:
        """Return the derivative of the target's objective along a unit direction (n,), and an estimate of its error.

        The levels inside must be at their solutions. The derivative is extrapolated from central differences at a step and at
        half of it; its error is the difference from an extrapolation at twice these steps.
        """
        origin = flatten([variable.data for variable in self._target.parameters]).clone()
        size, before = float(origin.norm()), self.unsolved
        scale = 1.0 + size
        best = self._difference(origin, scale, direction)
        # Small variables may be of their size for a reason, or just have left zero.
        while best.rough and scale > max(size, _SMALLEST):
            scale /= 10
            best = min(best, self._difference(origin, scale, direction), key=lambda d: (d.unsolved > _ROUGH, d.error))
        self.unsolved = max(before, best.unsolved)
        return best.value, best.error

    def _difference(self, origin: Tensor, scale: float, direction: Tensor) -> _Extrapolated:
        """Return the derivative from steps for variables of the size `scale`; its error is infinite if an objective is."""
        variables = [variable.data for variable in self._target.parameters]
        step = _STEP.get(origin.dtype, 3e-2) * scale
        differences, self.unsolved = [], 0.0
        try:
            # Each scale starts at the solutions: those far away may be of no use to the next.
            with put_back(self._problem):
                for size in (2 * step, step, step / 2):
                    values = []
                    for sign in (1.0, -1.0):
                        _write(variables, origin + sign * size * direction)
                        self.solve_inside(self._target.name)
                        values.append(Objective.of(self._target, self._point).number())
                    differences.append((values[0] - values[1]) / (2 * size))
        except NonFiniteError:
            return _Extrapolated(0.0, math.inf, self.unsolved)
        coarse, fine = ((4 * narrow - wide) / 3 for wide, narrow in itertools.pairwise(differences))
        return _Extrapolated(fine, abs(fine - coarse), self.unsolved)


def _exact(level: Level) -> Implicit:
    products = level.estimator.products if isinstance(level.estimator, Implicit) else "autograd"
    kind = ConjugateGradient if level.residual is None else GMRES
    return kind(iterations=1_000, rtol=1e-9 if products == "finite_difference" else 1e-12, products=products)


def _write(variables: list[Tensor], flat: Tensor) -> None:
    torch._foreach_copy_(variables, list(unflatten(flat, variables)))
