"""Laws 2 and 3: a pullback is linear, the transpose of its pushforward, and each level is pulled back once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from core_cases import Calls, Counting, conjugate_gradient, distance, drawn, point_of, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mlopt
from mlopt.problem import Block, Linearization, Vectors
from mlopt.tensors import Tensors, axpy, dot, scale, zeros_like
from mlopt.testing import ladder, quadratic

LINEAR = {
    "identity": mlopt.Identity(),
    "identity_forward": mlopt.Identity(products="forward"),
    "neumann": mlopt.Neumann(iterations=4, step_size=0.1),
    "neumann_damped": mlopt.Neumann(iterations=4, step_size=0.1, damping=0.5),
    "dense": mlopt.Dense(),
    "conjugate_gradient_converged": conjugate_gradient(),
}

#: Problems, each with the level that is pulled back.
PLACES = [("two", "y"), ("diamond", "base"), ("nested", "y"), ("nested_with_two_inside", "y")]


def linearized(shape: str, level: str, estimator: mlopt.Estimator, seed: int) -> Linearization:
    problem = quadratic(shape, estimator, seed=seed, size=1).problem
    return problem[level].estimator.linearize(point_of(problem), level)


def random_vectors(blocks: Sequence[Block], generator: torch.Generator) -> dict[Block, Tensors]:
    """Return a vector on each block, in the shapes of a quadratic level of size 1."""
    return {b: (torch.randn(2, 1, generator=generator), torch.randn((), generator=generator)) for b in blocks}


def paired(a: Vectors, b: Vectors) -> Tensor:
    """Return <a, b>, absent blocks being zero."""
    return torch.stack([dot(a[block], b[block]) for block in a if block in b]).sum()


def in_one(vectors: Vectors, blocks: Sequence[Block]) -> Tensor:
    return torch.cat([x.reshape(-1) for block in blocks for x in vectors[block]])


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize(("shape", "level"), PLACES)
@drawn(4)
@given(seed=seeds, a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_a_pullback_is_linear(shape: str, level: str, name: str, seed: int, a: float, b: float) -> None:
    rule = linearized(shape, level, LINEAR[name], seed)
    generator = torch.Generator().manual_seed(seed)
    first, second = random_vectors(rule.blocks, generator), random_vectors(rule.blocks, generator)
    both = {block: axpy(b, second[block], scale(a, first[block])) for block in rule.blocks}
    u, v, w = (in_one(rule.pullback(cotangent), rule.arguments) for cotangent in (first, second, both))
    assert torch.linalg.vector_norm(w - a * u - b * v) <= 1e-9 * (1 + u.norm() + v.norm())


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize(("shape", "level"), PLACES)
@drawn(3)
@given(seed=seeds)
def test_pullback_and_pushforward_are_transposes(shape: str, level: str, name: str, seed: int) -> None:
    rule = linearized(shape, level, LINEAR[name], seed)
    generator = torch.Generator().manual_seed(seed)
    cotangent, tangent = random_vectors(rule.blocks, generator), random_vectors(rule.arguments, generator)
    back, forth = paired(rule.pullback(cotangent), tangent), paired(cotangent, rule.pushforward(tangent))
    assert abs(back - forth) <= 1e-9 * (1 + abs(back))


@pytest.mark.parametrize("name", ["neumann", "dense"])
def test_pullback_and_pushforward_are_transposes_two_nestings_deep(name: str) -> None:
    rule = linearized("nested_twice", "x", LINEAR[name], 1)
    generator = torch.Generator().manual_seed(1)
    cotangent, tangent = random_vectors(rule.blocks, generator), random_vectors(rule.arguments, generator)
    back, forth = paired(rule.pullback(cotangent), tangent), paired(cotangent, rule.pushforward(tangent))
    assert abs(back - forth) <= 1e-9 * abs(back)


@drawn(10)
@given(seed=seeds, terms=st.integers(1, 5))
def test_a_truncated_series_is_its_polynomial(seed: int, terms: int) -> None:
    """The series is linear although it is truncated."""
    alpha = 0.05
    dense = linearized("two", "y", mlopt.Dense(), seed)
    short = linearized("two", "y", mlopt.Neumann(iterations=terms, step_size=alpha), seed)
    hessian = torch.stack([in_one(dense.product({"y": unit}, ["y"]), ["y"]) for unit in _units()])
    cotangent = random_vectors(["y"], torch.Generator().manual_seed(seed))
    power, total = in_one(cotangent, ["y"]), torch.zeros(3)
    for _ in range(terms + 1):
        total = total + alpha * power
        power = power - alpha * hessian @ power
    mixed = -in_one(dense.product({"y": (total[:2].reshape(2, 1), total[2])}, ["x"]), ["x"])
    assert distance(in_one(short.pullback(cotangent), ["x"]), mixed) < 1e-12


def _units() -> list[Tensors]:
    return [(unit[:2].reshape(2, 1), unit[2]) for unit in torch.eye(3)]


def test_wanted_omits_the_other_arguments() -> None:
    rule = linearized("nested", "z", mlopt.Dense(), 1)
    cotangent = random_vectors(["z"], torch.Generator().manual_seed(1))
    everything, some = rule.pullback(cotangent), rule.pullback(cotangent, ["y"])
    assert set(everything) == {"x", "y"}
    assert set(some) == {"y"}
    assert torch.equal(in_one(some, ["y"]), in_one(everything, ["y"]))


@pytest.mark.parametrize("products", ["autograd", "forward", "finite_difference"])
@pytest.mark.parametrize(("shape", "level"), [("two", "y"), ("nested", "y")])
def test_the_pullback_of_zero_is_zero_and_keeps_the_warm_start(shape: str, level: str, products: str) -> None:
    problem = quadratic(shape, mlopt.Neumann(iterations=1, warm_start=True, products=products), size=1).problem
    kept = random_vectors([level], torch.Generator().manual_seed(0))
    point = point_of(problem, warm=dict(kept))
    rule = problem[level].estimator.linearize(point, level)
    out = rule.pullback({level: zeros_like(kept[level])})
    assert all(not v.any() for vectors in out.values() for v in vectors)
    assert rule.report.products == 0
    assert point.carryover.warm.keys() == kept.keys()
    assert point.warm_start(level) is kept[level]
    # The pullback of another vector replaces it by the solution.
    rule.pullback(random_vectors([level], torch.Generator().manual_seed(1)))
    assert point.warm_start(level) is not kept[level]


def test_a_warm_start_lowers_the_residual() -> None:
    problem = quadratic("two", mlopt.ConjugateGradient(iterations=1, warm_start=True), size=1).problem
    point = point_of(problem, warm={})
    cotangent = random_vectors(["y"], torch.Generator().manual_seed(1))
    residuals = []
    for _ in range(4):
        rule = problem["y"].estimator.linearize(point, "y")
        rule.pullback(cotangent)
        residuals.append(rule.report.residual)
    assert residuals[-1] < residuals[1] < residuals[0]


def test_a_diverged_solution_is_not_a_warm_start() -> None:
    """One solve in a region of negative curvature must not spoil later ones."""
    diverging = mlopt.Neumann(iterations=20, step_size=10.0, warm_start=True)
    problem = quadratic("two", diverging, size=1).problem
    point = point_of(problem, warm={})
    rule = problem["y"].estimator.linearize(point, "y")
    rule.pullback(random_vectors(["y"], torch.Generator().manual_seed(1)))
    assert rule.report.residual > 1e3
    assert point.warm_start("y") is None


@pytest.mark.parametrize(
    "products",
    ["autograd", "forward", "finite_difference"],
)
def test_the_pullback_of_zero_does_not_evaluate_the_loss(products: str) -> None:
    loss = Calls(_inner)
    problem = mlopt.Problem(
        mlopt.Level("x", mlopt.variables(torch.ones(2)), _outer),
        mlopt.Level("y", mlopt.variables(torch.ones(2)), loss, estimator=mlopt.Dense(products=products)),
    )
    rule = problem["y"].estimator.linearize(point_of(problem), "y")
    rule.pullback({"y": (torch.zeros(2),)})
    assert loss.count == 0


def _outer(module: nn.Module, batch: None, *, y: nn.Module) -> Tensor:
    return (module() * y()).sum()


def _inner(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
    return (module() - x()).square().sum()


@pytest.mark.parametrize(("products", "evaluations"), [("forward", 1), ("finite_difference", 2)])
def test_the_identity_computes_only_the_mixed_product(products: str, evaluations: int) -> None:
    loss = Calls(_inner)
    problem = mlopt.Problem(
        mlopt.Level("x", mlopt.variables(torch.ones(2)), _outer),
        mlopt.Level("y", mlopt.variables(torch.zeros(2)), loss, estimator=mlopt.Identity(products=products)),
    )
    mlopt.hypergradient(problem)
    # The first one reads the kind of the loss, and compares products with differences, once.
    loss.count = 0
    for calls in (1, 2):
        mlopt.hypergradient(problem)
        assert loss.count == calls * evaluations


def test_an_objective_that_ignores_a_solution_has_a_zero_hypergradient() -> None:
    """The outer loss refers to y, but its derivative by y is zero: the result is zero, not an error."""

    def outer(module: nn.Module, batch: None, *, y: nn.Module) -> Tensor:
        return module().sum() * 0 + 0 * y().sum()

    problem = mlopt.Problem(
        mlopt.Level("x", mlopt.variables(torch.ones(2)), outer),
        mlopt.Level("y", mlopt.variables(torch.ones(2)), _inner, estimator=mlopt.Dense()),
    )
    result = mlopt.hypergradient(problem)
    assert torch.equal(result.gradient["value"], torch.zeros(2))
    assert result.reports["y"].converged is True


@drawn(5)
@given(rungs=st.integers(1, 6), seed=seeds)
def test_each_level_is_pulled_back_once(rungs: int, seed: int) -> None:
    counting = Counting(mlopt.Dense())
    problem = quadratic(ladder(rungs), counting, seed=seed, size=1).problem
    mlopt.hypergradient(problem)
    once = {level.name: 1 for level in problem if level.name != "outer"}
    assert dict(counting.linearizations) == once
    assert dict(counting.pullbacks) == once


def test_the_cost_of_a_ladder_grows_with_its_rungs_not_with_its_paths() -> None:
    spent = []
    for rungs in (1, 2, 3, 4, 8):
        problem = quadratic(ladder(rungs), conjugate_gradient(), size=1).problem
        losses = {level.name: Calls(level.loss) for level in problem}
        levels = [
            mlopt.Level(level.name, level.module, losses[level.name], estimator=level.estimator) for level in problem
        ]
        problem = mlopt.Problem(*levels)
        mlopt.hypergradient(problem)  # products are compared with differences, once
        for loss in losses.values():
            loss.count = 0
        reports = mlopt.hypergradient(problem).reports
        assert set(reports) == set(losses) - {"outer"}
        assert all(report.solves == 1 for report in reports.values())
        # Autograd keeps the graph of the gradient: one evaluation of each loss serves all its products.
        assert {loss.count for loss in losses.values()} == {1}
        spent.append(sum(report.products for report in reports.values()))
    # Three unknowns a level: conjugate gradients need three products, one more for rounding.
    assert all(count <= 4 * (3 * rungs + 1) for rungs, count in zip((1, 2, 3, 4, 8), spent, strict=True))


def test_nested_levels_have_a_report_each() -> None:
    result = mlopt.hypergradient(quadratic("nested_twice", mlopt.Dense(), size=1).problem)
    assert set(result.reports) == {"x", "y", "z"}
    assert result.reports["x"].solves == 1
    assert result.reports["z"].solves > result.reports["y"].solves > 1
