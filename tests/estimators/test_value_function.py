"""The value function's pullback: exact on quadratics, of second order in the perturbation elsewhere, gone afterwards."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from core_cases import Calls, Restless, distance, drawn, gradient_of, point_of, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD

import mlopt
from mlopt.testing import SHAPES, logistic_regression, quadratic

FLAT = [name for name in SHAPES if not name.startswith("nested")]


@pytest.mark.parametrize("shape", FLAT)
@drawn(3)
@given(seed=seeds)
def test_quadratics_agree_with_the_closed_form(shape: str, seed: int) -> None:
    """At any perturbation: the central difference is exact, and descent is the only error."""
    case = quadratic(shape, mlopt.ValueFunction(steps=150, step_size=0.3, perturbation=0.5), seed=seed, size=1)
    assert case.error(mlopt.hypergradient(case.problem).gradient) < 1e-8


@drawn(8)
@given(seed=seeds, condition=st.floats(1.5, 5.0))
def test_quadratics_agree_with_the_closed_form_by_default(seed: int, condition: float) -> None:
    case = quadratic("two", mlopt.ValueFunction(steps=200), seed=seed, condition=condition)
    result = mlopt.hypergradient(case.problem)
    assert case.error(result.gradient) < 1e-7
    assert result.reports["y"].residual < 1e-6


@drawn(8)
@given(seed=seeds, steps=st.integers(2, 6), away=st.booleans())
def test_a_few_steps_on_a_quadratic_are_a_neumann_series(seed: int, steps: int, away: bool) -> None:
    """Also away from the solution: the way there is common to both sides."""
    gradients = []
    for rule in (
        mlopt.ValueFunction(steps=steps, step_size=0.1, perturbation=0.3),
        mlopt.Neumann(iterations=steps - 1, step_size=0.1),
    ):
        problem = quadratic("two", rule, seed=seed).problem
        with torch.no_grad():
            problem["y"].module.weight.add_(0.7 * away)
        gradients.append(gradient_of(problem))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@drawn(5)
@given(seed=seeds)
def test_the_error_is_of_second_order_in_the_perturbation(seed: int) -> None:
    errors = []
    for nu in (0.1, 0.05, 0.01):
        case = logistic_regression(mlopt.ValueFunction(steps=60, step_size=0.8, perturbation=nu), seed=seed, ridge=0.5)
        errors.append(case.error(mlopt.hypergradient(case.problem).gradient))
    assert errors[2] < 1e-3
    assert 3.0 < errors[0] / errors[1] < 5.0
    assert 18 < errors[1] / errors[2] < 32


@drawn(5)
@given(seed=seeds)
def test_logistic_regression_by_default(seed: int) -> None:
    case = logistic_regression(mlopt.ValueFunction(steps=150), seed=seed, ridge=0.5)
    assert case.error(mlopt.hypergradient(case.problem).gradient) < 1e-5


@drawn(6)
@given(seed=seeds, a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_a_pullback_is_linear_on_quadratics(seed: int, a: float, b: float) -> None:
    problem = quadratic("two", mlopt.ValueFunction(steps=4, step_size=0.1, perturbation=0.1), seed=seed, size=1).problem
    rule = problem["y"].estimator.linearize(point_of(problem), "y")
    generator = torch.Generator().manual_seed(seed)
    first, second = ((torch.randn(2, 1, generator=generator), torch.randn((), generator=generator)) for _ in "ab")
    both = tuple(a * x + b * y for x, y in zip(first, second, strict=True))
    one, two, three = (torch.cat([x.reshape(-1) for x in rule.pullback({"y": v})["x"]]) for v in (first, second, both))
    assert (three - a * one - b * two).norm() <= 1e-10 * (1 + one.norm() + two.norm())


def held_out(x: nn.Module, batch: None, *, y: nn.Module) -> Tensor:
    return (x() * y()).sum()


def inner(y: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
    return (y() - x()).square().sum()


def two(estimator: mlopt.Estimator, loss: Any = inner) -> mlopt.Problem:
    return mlopt.Problem(
        mlopt.Level("x", mlopt.variables(torch.tensor([1.0, 2.0])), held_out),
        mlopt.Level("y", mlopt.variables(torch.tensor([0.5, 0.3])), loss, estimator=estimator),
    )


@pytest.mark.parametrize(("arguments", "evaluations"), [({"step_size": 0.2}, 10), ({}, 30)])
def test_what_it_evaluates(arguments: dict[str, Any], evaluations: int) -> None:
    loss = Calls(inner)
    problem = two(mlopt.ValueFunction(steps=4, **arguments), loss)
    rule = problem["y"].estimator.linearize(point_of(problem), "y")
    assert not rule.pullback({"y": (torch.zeros(2),)})["x"][0].any()
    assert loss.count == 0
    rule.pullback({"y": (torch.ones(2),)})  # products are compared with differences, once
    loss.count = 0
    rule.pullback({"y": (torch.ones(2),)})
    assert loss.count == evaluations


def test_the_residual_is_that_of_descent() -> None:
    """With H = 2, one step of 0.1 leaves 1 - 0.2 of the cotangent over, two leave the square of it."""
    for steps in (1, 2):
        report = mlopt.hypergradient(two(mlopt.ValueFunction(steps=steps, step_size=0.1, rtol=0.7))).reports["y"]
        assert report.residual == pytest.approx(0.8**steps, abs=1e-9)
        assert report.converged is (steps == 2)
    assert mlopt.hypergradient(two(mlopt.ValueFunction(steps=2))).reports["y"].converged is None


def test_divergence_is_said_and_then_raised() -> None:
    report = mlopt.hypergradient(two(mlopt.ValueFunction(steps=3, step_size=3.0))).reports["y"]
    assert "did not reach" in report.remarks[0]
    with pytest.raises(mlopt.NonFiniteError, match="level 'y': 900 steps of gradient descent with step_size=3"):
        mlopt.hypergradient(two(mlopt.ValueFunction(steps=900, step_size=3.0)))


def test_no_curvature_is_said() -> None:
    def flat(y: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
        return x().sum() * 0 + y().sum()

    report = mlopt.hypergradient(two(mlopt.ValueFunction(steps=2), flat)).reports["y"]
    assert report.remarks[0] == "no curvature along the cotangent"


def test_a_warm_start_goes_on_from_the_displacement() -> None:
    """One step each outer step, on an unchanged problem, is the same descent as all of them at once."""
    problem = two(mlopt.ValueFunction(steps=2, step_size=0.1, warm_start=True))
    point = point_of(problem, warm={})
    load = {"y": (torch.tensor([1.0, -2.0]),)}
    residuals = []
    for _ in range(3):
        rule = problem["y"].estimator.linearize(point, "y")
        pulled = rule.pullback(load)["x"][0]
        residuals.append(rule.report.residual)
    assert residuals == pytest.approx([0.8**2, 0.8**4, 0.8**6], abs=1e-8)
    whole = two(mlopt.ValueFunction(steps=6, step_size=0.1))
    expected = whole["y"].estimator.linearize(point_of(whole), "y").pullback(load)["x"][0]
    assert distance(pulled, expected) < 1e-8


@pytest.mark.parametrize("level", ["y", "z"])
def test_nests_are_refused(level: str) -> None:
    rules = {"y": mlopt.Dense(), "z": mlopt.Dense()} | {level: mlopt.ValueFunction(steps=2)}
    with pytest.raises(mlopt.EstimatorError, match=f"level '{level}'"):
        mlopt.hypergradient(quadratic("nested", rules).problem)


@pytest.mark.parametrize(
    "arguments", [{"steps": 0}, {"step_size": 0.0}, {"perturbation": -1.0}, {"rtol": float("inf")}]
)
def test_arguments_are_checked(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        mlopt.ValueFunction(**arguments)


def restless(estimator: mlopt.Estimator, net: nn.Module, fatal: int = 0) -> mlopt.Problem:
    generator = torch.Generator().manual_seed(0)
    training, validation = (torch.randn(6, 2, generator=generator) for _ in "ab")
    calls = 0

    def loss(net: nn.Module, batch: Tensor, *, weights: nn.Module) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == fatal:
            raise RuntimeError("stop here")
        ridge = sum(p.square().sum() for p in net.body.parameters())
        return (weights().sigmoid() * (net(batch) - 1).square()).mean() + 0.1 * ridge

    def outer(weights: nn.Module, batch: Tensor, *, net: nn.Module) -> Tensor:
        return (net(batch) + 1).square().mean()

    weights = mlopt.variables(torch.randn(6, generator=generator))
    return mlopt.Problem(
        mlopt.Level("weights", weights, outer, data=[validation], optimizer=partial(SGD, lr=0.0)),
        mlopt.Level(
            "net", net, loss, data=[training], optimizer=partial(SGD, lr=0.1, momentum=0.9), estimator=estimator
        ),
    )


@pytest.mark.parametrize("fatal", range(7))
def test_nothing_moves_even_when_a_loss_raises(fatal: int) -> None:
    net = Restless()
    problem = restless(mlopt.ValueFunction(steps=2, step_size=0.1), net, fatal)
    before, generator = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    if fatal:
        with pytest.raises(RuntimeError, match="stop here"):
            mlopt.hypergradient(problem)
    else:
        assert gradient_of(problem).any()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert torch.equal(generator, torch.get_rng_state())
    assert all(p.grad is None for p in net.parameters())


def test_all_evaluations_see_the_same_masks() -> None:
    """Else the difference would be of masks, over a small perturbation. A few steps from one point are a Neumann series."""
    gradient = gradient_of(
        restless(mlopt.ValueFunction(steps=4, step_size=0.05, perturbation=1e-5), Restless()), seed=0
    )
    # Off the minimum, each side's descent leaves the point; the differences of gradients follow it, to first order in the step.
    series = gradient_of(restless(mlopt.Neumann(iterations=3, step_size=0.05), Restless()), seed=0)
    assert distance(gradient, series) < 0.3
    assert gradient.norm() < 10 * series.norm()


def test_training_inside_solve_does_not_depend_on_the_estimator() -> None:
    ends = []
    for estimator in (mlopt.Identity(), mlopt.ValueFunction(steps=3, warm_start=True)):
        net = Restless()
        mlopt.solve(restless(estimator, net), 4, seed=0, progress=False)
        ends.append([*net.state_dict().values(), torch.rand(1)])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
