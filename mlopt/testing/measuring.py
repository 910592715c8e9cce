"""Tools of the contract's tests: linearised levels, dense matrices of two levels, and comparisons."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..problem import Block, Carryover, Estimator, Linearization, Point, Problem, Report, Vectors
from ..rng import GeneratorState
from ..tensors import Tensors, dot, flatten, zeros_like
from .side_effects import same

__all__ = [
    "Counting",
    "Rule",
    "TwoLevels",
    "assert_near",
    "assert_raises",
    "assert_unmoved",
    "check_fields",
    "in_one",
    "paired",
    "random_vectors",
    "true_residual",
]


class Rule:
    """A level's linearisation at a point; each pullback linearises again, as in `hypergradient`."""

    def __init__(self, problem: Problem, level: str, *, warm: bool = False) -> None:
        generators = {name.name: GeneratorState.seeded(0) for name in problem}
        start = {level: tuple(torch.ones_like(p) for p in problem[level].parameters)}
        carryover = Carryover(warm=start) if warm else None
        self.point = Point(problem, {name.name: None for name in problem}, generators, carryover=carryover)
        self.inner: Any = self._linearize(level)
        self._level = level
        self.blocks, self.arguments = self.inner.blocks, self.inner.arguments

    def _linearize(self, level: str) -> Linearization:
        estimator = self.point.problem[level].estimator
        assert estimator is not None
        return estimator.linearize(self.point, level)

    def pullback(self, cotangent: Vectors, wanted: Sequence[str] | None = None) -> dict[Block, Tensors]:
        return self._linearize(self._level).pullback(cotangent, wanted)


class Counting(Estimator):
    """A wrapper of an estimator that counts the pullbacks of each level."""

    def __init__(self, inner: Estimator) -> None:
        self.inner = inner
        self.pullbacks: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def linearize(self, point: Point, level: str) -> Linearization:
        rule = self.inner.linearize(point, level)
        pullback = rule.pullback

        def counted(cotangent: Vectors, wanted: Sequence[str] | None = None) -> dict[Block, Tensors]:
            self.pullbacks[level] += 1
            return pullback(cotangent, wanted)

        rule.pullback = counted  # type: ignore[method-assign]
        return rule


class TwoLevels:
    """The matrices of a problem of two levels, from products with unit vectors: H, B = d2f / dx du, v, and the direct term."""

    def __init__(self, problem: Problem) -> None:
        outer, inner = problem.levels
        batches = {level.name: None if level.data is None else next(iter(level.data)) for level in problem}
        point = Point(problem, batches, {level.name: GeneratorState.seeded(0) for level in problem})
        with point.generators_preserved():
            value = outer.definition(outer.module, batches[outer.name], **{inner.name: inner.module})
            both = torch.autograd.grad(
                value, [*inner.parameters, *outer.parameters], materialize_grads=True, allow_unused=True
            )
            self.cotangent = flatten(both[: len(inner.parameters)]).detach()
            self.direct = flatten(both[len(inner.parameters) :]).detach()
            value = inner.definition(inner.module, batches[inner.name], **{outer.name: outer.module})
            slope = flatten(torch.autograd.grad(value, inner.parameters, create_graph=True))
            rows = [
                torch.autograd.grad(
                    entry, [*inner.parameters, *outer.parameters], retain_graph=True, materialize_grads=True
                )
                for entry in slope
            ]
        self.hessian = torch.stack([flatten(row[: len(inner.parameters)]) for row in rows])
        self.mixed = torch.stack([flatten(row[len(inner.parameters) :]) for row in rows])


def true_residual(problem: Problem, gradient: Tensor, damping: float) -> float:
    """Return ||v - (H + damping) q|| / ||v||, with q from the gradient: B must be square and invertible."""
    parts = TwoLevels(problem)
    q = torch.linalg.solve(parts.mixed.T, parts.direct - gradient)
    return float((parts.cotangent - parts.hessian @ q - damping * q).norm() / parts.cotangent.norm())


def check_fields(report: Report) -> None:
    """Assert that the fields of a report do not contradict one another."""
    assert report.estimator, "the report does not name the estimator"
    assert report.seconds > 0, "no time was spent"
    assert min(report.iterations, report.products, report.solves, report.age) >= 0, "a negative count"
    assert report.residual is None or 0 <= report.residual < math.inf, f"residual={report.residual}"
    assert report.converged is None or report.residual is not None, "it converged, but reports no residual"
    assert report.step is None or report.step > 0, f"step={report.step}"
    if report.curvature is not None:
        assert report.curvature[0] <= report.curvature[1], f"curvature={report.curvature}"
    assert len(set(report.remarks)) == len(report.remarks), "a remark is repeated"


def random_vectors(rule: Rule, blocks: Sequence[Block], generator: torch.Generator) -> dict[Block, Tensors]:
    """Return a random vector on each block, in the shapes of its variables."""
    values = rule.point.values
    return {b: tuple(torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in values[b]) for b in blocks}


def in_one(vectors: Vectors, rule: Rule) -> Tensor:
    """Return the cotangents on all arguments in one vector, absent ones as zeros."""
    values = rule.point.values
    return flatten([x for name in rule.arguments for x in vectors.get(name, zeros_like(values[name]))])


def paired(a: Vectors, b: Vectors) -> float:
    """Return <a, b>, absent blocks being zero."""
    return sum(float(dot(a[block], b[block])) for block in a if block in b)


def assert_near(vector: Tensor, expected: Tensor, tolerance: float, label: str) -> None:
    """Assert that two vectors agree to a relative tolerance."""
    gap = float((vector - expected).norm() / expected.norm())
    assert gap <= tolerance, f"{label}: the hypergradients differ by {gap:.1e}"


def assert_unmoved(before: dict[str, Any], after: dict[str, Any], label: str) -> None:
    """Assert that two snapshots are equal; the failure names the entries that moved."""
    moved = [name for name in before if not same(before[name], after[name])]
    assert not moved, f"{label}: it moved {', '.join(moved)}"


def assert_raises(kind: type[Exception], act: Callable[[], object], label: str) -> Exception:
    """Return the error of this kind that `act()` raises; fail with the label if it raises none."""
    try:
        act()
    except kind as error:
        return error
    raise AssertionError(label)
