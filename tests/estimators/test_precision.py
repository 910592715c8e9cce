"""Single and half precision: how far hypergradients are from those in double."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from core_cases import distance, drawn, gradient_of, point_of, seeds
from hypothesis import given
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mlopt
from mlopt.testing import ladder, quadratic

EXACT = {
    "dense": mlopt.Dense(),
    "conjugate_gradient": mlopt.ConjugateGradient(iterations=50),
    "conjugate_gradient_forward": mlopt.ConjugateGradient(iterations=50, products="forward"),
    "minres": mlopt.MINRES(iterations=50),
    "neumann": mlopt.Neumann(iterations=300),
}


@pytest.mark.parametrize("shape", ["two", "chain_of_three", "diamond", "nested", "nested_and_referred_to"])
@pytest.mark.parametrize("name", EXACT)
@drawn(3)
@given(seed=seeds)
def test_single_precision_against_the_closed_form(name: str, shape: str, seed: int) -> None:
    if shape.startswith("nested") and name in ("conjugate_gradient_forward", "neumann"):
        shape = "two"  # nested ones take seconds with these
    case = quadratic(shape, EXACT[name], seed=seed, size=1, dtype=torch.float32)
    assert case.error(mlopt.hypergradient(case.problem).gradient) < 1e-4


def test_a_ladder_in_single_precision() -> None:
    case = quadratic(ladder(4), EXACT["dense"], size=1, dtype=torch.float32)
    assert case.error(mlopt.hypergradient(case.problem).gradient) < 1e-4


def cleaning(dtype: torch.dtype, estimator: mlopt.Estimator, activation: type[nn.Module] = nn.Tanh) -> mlopt.Problem:
    """Return sample weights over a network, the same up to the dtype; its values are exact in bfloat16."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 64), activation(), nn.Linear(64, 4)).bfloat16()
    inputs, held_out = (torch.randn(200, 16).bfloat16().to(dtype) for _ in range(2))
    labels = torch.randint(4, (200,))

    def training(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
        return (weights().sigmoid() * cross_entropy(module(inputs), labels, reduction="none")).mean()

    def validation(weights: nn.Module, batch: Any, *, network: nn.Module) -> Tensor:
        return cross_entropy(network(held_out), labels)

    return mlopt.Problem(
        mlopt.Level("weights", mlopt.variables(torch.zeros(200, dtype=dtype)), validation),
        mlopt.Level("network", copy.deepcopy(network).to(dtype), training, estimator=estimator),
    )


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize(
    ("products", "single", "half"),
    [("autograd", 1e-6, 0.005), ("forward", 1e-6, 0.005), ("finite_difference", 1e-3, 0.05)],
)
def test_mixed_products_of_a_network(products: str, single: float, half: float, activation: type[nn.Module]) -> None:
    rule = mlopt.Identity(products=products)
    exact = gradient_of(cleaning(torch.float64, mlopt.Identity(), activation))
    assert distance(gradient_of(cleaning(torch.float32, rule, activation)).double(), exact) < single
    assert distance(gradient_of(cleaning(torch.bfloat16, rule, activation)).double(), exact) < half


def test_second_derivatives_of_half_precision_are_taken_in_single_precision() -> None:
    """At copies of the rounded variables: for the same cotangent, only the result is rounded."""
    rules = [
        mlopt.ConjugateGradient(iterations=8, damping=0.1, warm_start=True),
        mlopt.MINRES(iterations=8, damping=0.1),
    ]
    for rule in rules:
        pulled = []
        for dtype in (torch.bfloat16, torch.float64):
            problem = cleaning(dtype, rule)
            point = point_of(problem, warm={})
            generator = torch.Generator().manual_seed(0)
            shapes = [p.shape for p in problem["network"].parameters]
            v = tuple(torch.randn(shape, generator=generator).bfloat16().to(dtype) for shape in shapes)
            linearization = rule.linearize(point, "network")
            for _ in range(2):  # the graph of the first pullback is used again
                back = linearization.pullback({"network": v})
            assert all(x.dtype == dtype for x in back["weights"])
            pulled.append(back["weights"][0].double())
        assert 1e-4 < distance(*pulled) < 3e-3


@pytest.mark.parametrize("products", ["autograd", "forward"])
@pytest.mark.parametrize("shape", ["two", "chain_of_three", "diamond", "nested", "nested_twice"])
def test_half_precision_against_the_closed_form(shape: str, products: str) -> None:
    """The matrices and the variables are rounded to eight bits."""
    rule = mlopt.ConjugateGradient(iterations=30, rtol=1e-6, products=products)
    half = quadratic(shape, rule, size=2, condition=2.0, dtype=torch.bfloat16)
    assert half.error(mlopt.hypergradient(half.problem, seed=0).gradient) < 0.02


def test_differences_are_taken_outside_autocast() -> None:
    """Its rounding would be divided by the step: the error would be several times as large."""
    exact = gradient_of(cleaning(torch.float64, mlopt.Identity()))
    problem = cleaning(torch.float32, mlopt.FiniteDifference())
    with torch.autocast("cpu", torch.bfloat16):
        gradient = gradient_of(problem)
        assert torch.is_autocast_enabled("cpu")
    # The cotangent is still that of the autocast forward pass, right to bfloat16's rounding.
    assert distance(gradient.double(), exact) < 0.01
