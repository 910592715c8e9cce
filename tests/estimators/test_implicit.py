"""The open base of the implicit estimators: a subclass's own linearisation counts, nested or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from core_cases import distance, gradient_of

import mlopt
from mlopt import linear
from mlopt.problem import Block, Linearization, Point, Vectors
from mlopt.tensors import Tensors
from mlopt.testing import quadratic


class Base(mlopt.Implicit):
    """Dense solves with autograd products."""

    products = "autograd"

    @property
    def solver(self) -> linear.LinearSolver:
        return linear.Dense()


class Delegating(Base):
    """Its own solver is wrong; the linearisation that it returns is another estimator's, and right."""

    @property
    def solver(self) -> linear.LinearSolver:
        return linear.Identity()

    def linearize(self, point: Point, level: str) -> Linearization:
        return mlopt.Dense().linearize(point, level)


class Other(Linearization):
    def __init__(self, conditions: Linearization) -> None:
        self._own = conditions
        self.blocks, self.arguments, self.report = conditions.blocks, conditions.arguments, conditions.report

    def pullback(self, cotangent: Vectors, wanted: Sequence[str] | None = None) -> dict[Block, Tensors]:
        return self._own.pullback(cotangent, wanted)


class Wrapping(Base):
    def linearize(self, point: Point, level: str) -> Any:
        return Other(super().linearize(point, level))


def test_a_nested_level_uses_the_linearization_of_its_estimator() -> None:
    case = quadratic("nested", {"y": mlopt.Dense(), "z": Delegating()}, seed=1, size=2)
    assert case.error(mlopt.hypergradient(case.problem).gradient) < 1e-8


def test_a_linearization_without_stationarity_conditions_cannot_be_nested() -> None:
    case = quadratic("two", Wrapping(), seed=1)
    assert case.error(mlopt.hypergradient(case.problem).gradient) < 1e-8
    problem = quadratic("nested", {"y": mlopt.Dense(), "z": Wrapping()}).problem
    with pytest.raises(
        mlopt.EstimatorError, match=r"level 'z' is solved inside 'y', and Wrapping.linearize .* a Other"
    ):
        mlopt.hypergradient(problem)


def test_a_streamed_level_can_be_nested() -> None:
    """The level around it uses the ordinary products."""
    streamed, plain = (
        quadratic("nested", {"y": mlopt.Dense(), "z": mlopt.Identity(streamed=streamed)}, seed=1).problem
        for streamed in (True, False)
    )
    assert distance(gradient_of(streamed), gradient_of(plain)) == 0.0
