"""The first-order penalty method: a pullback from the first derivatives at two penalised solutions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import torch

from ..errors import NonFiniteError
from ..linear.neumann import POWER_ITERATIONS, largest_eigenvalue
from ..problem import (
    Block,
    Bounds,
    Estimator,
    FixedPoint,
    LevelSize,
    Linearization,
    Objective,
    Point,
    PullbackCost,
    Report,
    Vectors,
    restored,
)
from ..tensors import Tensors, add, axpy, is_finite, norm, overwrite, scale, subtract, zeros_like
from ..validation import at_least, boolean, positive_or_none
from .products import FiniteDifferenceProduct, Moves, SecondDerivatives, full_precision, moves_of, relative_step

__all__ = ["ValueFunction"]

#: Power iterations find an eigenvalue below the largest. (On a quadratic, gradient descent is a Neumann series.)
_MARGIN = 1.2


@attrs.frozen(kw_only=True)
class ValueFunction(Estimator):
    """Pull a cotangent back by adding it to the level's objective and measuring the change of the level's value.

    With the penalised solutions y+ and y- and their difference quotient, for a cotangent v,

        y+- ~ argmin_y f(y, u) +- nu <v, y>
        u_bar = (f_u(y+, u) - f_u(y-, u)) / (2 nu)  ->  -(d2f / du dy) H^-1 v

    with an error of O(nu^2) for exact solutions. Plain gradient descent from the present variables approximates them, in virtual
    steps: 2 `steps` + 2 first derivatives, and no second ones. On a quadratic f this is a Neumann series of `steps` summands, at
    any nu.

    Args:
        steps: the number of gradient descent steps to each of y+ and y-.
        step_size: of gradient descent, below 2 / lambda_max(H); if None, 1 / (1.2 lambda_max) with lambda_max from ten power
            iterations on differences of gradients, at twenty first derivatives.
        perturbation: nu; if None, the largest that keeps y+- within a distance from the present variables that suits the dtype,
            relative to their norm: 1e-5 in float64, 1e-3 in float32.
        rtol: the pullback counts as converged if ||(f_y(y+) - f_y(y-)) / (2 nu) + v|| <= rtol ||v||; if None, the report leaves
            `converged` open.
        warm_start: inside `solve`, start from the displacement (y+ - y-) / (2 nu) of the previous outer step.

    Source: Kwon et al. 2023 (arXiv 2301.10945); with central differences, arXiv 2509.02937.

    Example:
        >>> from mlopt.testing import quadratic
        >>> case = quadratic("two", mlopt.ValueFunction(steps=50))
        >>> case.error(mlopt.hypergradient(case.problem).gradient) < 1e-3
        True
    """

    steps: int = attrs.field(default=10, validator=at_least(1))
    step_size: float | None = attrs.field(default=None, validator=positive_or_none)
    perturbation: float | None = attrs.field(default=None, validator=positive_or_none)
    rtol: float | None = attrs.field(default=None, validator=positive_or_none)
    warm_start: bool = attrs.field(default=False, validator=boolean)

    @property
    def needs_whole(self) -> str:
        return ""

    def linearize(self, point: Point, level: str) -> Linearization:
        self._refuse_levels_inside(point, level)
        return _Penalty(self, point, level)

    def cost(self, size: LevelSize) -> PullbackCost | None:
        searches = self.step_size is None
        power = 2 * size.variables + size.product if searches else 0
        # Copies of the present variables, the penalty, the slope, and both ends of the descents.
        descent = 5 * size.variables + size.gradient
        return PullbackCost(
            memory=max(power, descent),
            kept=self.warm_start * size.variables,
            evaluations=2 * self.steps + 2 + 2 * POWER_ITERATIONS * searches,
            products=POWER_ITERATIONS * searches,
        )

    def __str__(self) -> str:
        warm = ", warm start" * self.warm_start
        return f"value function, {self.steps} step{'s' * (self.steps != 1)} of gradient descent{warm}"


class _Penalty(Linearization):
    """The derivative of a level's solution, from penalised solutions."""

    def __init__(self, rule: ValueFunction, point: Point, name: str) -> None:
        self._rule, self._point, self._name = rule, point, name
        self.blocks, self.arguments = (name,), point.problem.graph[name].arguments
        self.report = Report(estimator=str(rule))
        fixed = FixedPoint.of(point.problem[name], point)
        self._objective = Objective.minimized(point.problem[name], point, fixed=fixed)
        self._bounds = Bounds.of(point.problem[name], point, lambda: self._objective.derivatives([name])[name])
        for doubt in filter(None, (fixed.doubt, self._bounds.doubt)):
            self.report.doubt(doubt)
        self._live = point.values[name]

    def pullback(self, cotangent: Vectors, wanted: Sequence[str] | None = None) -> dict[Block, Tensors]:
        wanted = self.arguments if wanted is None else wanted
        load = self._bounds.on_free(cotangent.get(self._name, ()))
        size = float(norm(load))
        if size == 0.0:
            return {argument: zeros_like(self._point.values[argument]) for argument in wanted}
        start = self._point.warm_start(self._name) if self._rule.warm_start else None
        blocks = (self._name, *wanted)
        with restored(self._live) as present, full_precision(self._live[0].device):
            step_size = self._rule.step_size or self._safe_step_size(load)
            nu = self._rule.perturbation or self._safe_perturbation(present, start, step_size, load)
            ends, slopes = [], []
            for shift in (nu, -nu):
                self._put(present if start is None else axpy(shift, start, present))
                self._descend(scale(shift, load), step_size)
                ends.append(tuple(variable.detach().clone() for variable in self._live))
                slopes.append(self._objective.derivatives(blocks))
        above, below = slopes
        pulled = {block: scale(0.5 / nu, subtract(above[block], below[block])) for block in blocks}
        residual = float(norm(self._bounds.on_free(add(pulled.pop(self._name), load)))) / size
        if self._rule.warm_start:
            self._point.keep_warm(self._name, scale(0.5 / nu, subtract(*ends)), residual)
        self._record(residual, nu)
        return pulled

    def _descend(self, penalty: Tensors, step_size: float) -> None:
        live = [variable.data for variable in self._live]
        for _ in range(self._rule.steps):
            slope = self._bounds.on_free(add(self._objective.derivatives([self._name])[self._name], penalty))
            torch._foreach_add_(live, list(slope), alpha=-step_size)
        if not is_finite(live):
            raise NonFiniteError(
                f"level {self._name!r}: {self._rule.steps} steps of gradient descent with step_size={step_size:.3g} led to "
                "variables that are not finite; pass a smaller step_size to ValueFunction"
            )

    def _safe_step_size(self, load: Tensors) -> float:
        """Return 1 / (1.2 lambda_max), for which gradient descent converges if f is convex."""
        products = SecondDerivatives(self._objective, FiniteDifferenceProduct)

        def matvec(q: Tensors) -> Tensors:
            self.report.products += 1
            return self._bounds.on_free(products({self._name: q}, [self._name])[self._name])

        largest = largest_eigenvalue(matvec, load)
        for remark in products.remarks:
            self.report.doubt(remark)
        if not math.isfinite(largest):
            raise NonFiniteError(f"level {self._name!r}: a difference of its gradients is not finite")
        if largest == 0.0:
            self.report.remarks = (*self.report.remarks, "no curvature along the cotangent")
            return 1.0
        return 1.0 / (_MARGIN * largest)

    def _safe_perturbation(self, present: Tensors, start: Tensors | None, step_size: float, load: Tensors) -> float:
        """Return the nu that bounds ||y+- - y|| by a fraction of ||y||, assuming convex f, which bounds the reach of descent."""
        reach = self._rule.steps * step_size * float(norm(load)) + (0.0 if start is None else float(norm(start)))
        moves = moves_of(self._objective.terms[0], {self._name: load}, [self._name]) or Moves()
        parts = [present if chosen is None else [present[k] for k in chosen] for chosen, _ in moves.groups]
        sizes = [max(least, float(norm(part))) for part, (_, least) in zip(parts, moves.groups, strict=True)]
        return relative_step(present) * moves.factor * min(sizes) / reach

    def _put(self, values: Tensors) -> None:
        overwrite([variable.data for variable in self._live], values)

    def _record(self, residual: float, nu: float) -> None:
        self.report.iterations += self._rule.steps
        self.report.residual, self.report.step = residual, nu
        if self._rule.rtol is not None:
            self.report.converged = residual <= self._rule.rtol and self.report.converged is not False
        if not residual < 1.0:
            remark = f"gradient descent did not reach the penalised solutions: residual {residual:.3g} of the cotangent"
            self.report.remarks = (*self.report.remarks, remark)
