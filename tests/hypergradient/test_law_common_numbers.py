"""Law 5: all evaluations inside one pullback see the same masks and other draws of the loss."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from core_cases import PRODUCTS, distance, drawn, gradient_of, point_of, seeds
from hypothesis import given
from torch import Tensor, nn

import mlopt
from mlopt.tensors import Tensors


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 1))


def dropped(module: nn.Module, batch: Tensor, *, weights: nn.Module) -> Tensor:
    ridge = sum(p.square().sum() for p in module.parameters())
    return (weights().sigmoid() * module(batch).squeeze(1).square()).mean() + 0.05 * ridge


def held_out(module: nn.Module, batch: Tensor, *, network: nn.Module) -> Tensor:
    return (network(batch) - 1).square().mean()


def build(seed: int, estimator: mlopt.Estimator, loss: Any = dropped) -> mlopt.Problem:
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(8, 3, generator=generator) for _ in range(2)]
    weights = mlopt.variables(torch.randn(8, generator=generator))
    return mlopt.Problem(
        mlopt.Level("weights", weights, held_out, data=batches[:1]),
        mlopt.Level("network", network(seed), loss, data=batches[1:], estimator=estimator),
    )


@drawn(8)
@given(seed=seeds)
def test_all_products_see_the_same_masks(seed: int) -> None:
    gradients = {}
    for products in PRODUCTS:
        # The damping exceeds the negative curvature: a division by a curvature close to zero would amplify rounding.
        estimator = mlopt.ConjugateGradient(iterations=5, damping=8.0, products=products)
        gradients[products] = gradient_of(build(seed, estimator))
    assert distance(gradients["forward"], gradients["autograd"]) < 1e-10
    assert distance(gradients["finite_difference"], gradients["autograd"]) < 1e-6


@drawn(8)
@given(seed=seeds)
def test_a_product_of_differences_agrees_with_the_traced_graph(seed: int) -> None:
    """H v and the mixed product see one mask: with two, the error would exceed the product itself."""
    blocks: list[Tensors] = []
    for products in ("autograd", "finite_difference"):
        problem = build(seed, mlopt.Identity(products=products))
        rule = problem["network"].estimator.linearize(point_of(problem), "network")
        generator = torch.Generator().manual_seed(seed)
        direction = tuple(torch.randn(p.shape, generator=generator) for p in problem["network"].parameters)
        product = rule.product({"network": direction}, ["network", "weights"])
        blocks.append((*product["network"], *product["weights"]))
    exact, differences = (torch.cat([t.reshape(-1) for t in block]) for block in blocks)
    assert distance(differences, exact) < 1e-7


@pytest.mark.parametrize("products", PRODUCTS)
def test_python_and_numpy_draw_the_same_in_all_evaluations(products: str) -> None:
    drawn_numbers: list[tuple[float, float, float]] = []

    def loss(module: nn.Module, batch: Tensor, *, weights: nn.Module) -> Tensor:
        drawn_numbers.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        return dropped(module, batch * drawn_numbers[-1][0], weights=weights)

    problem = build(0, mlopt.ConjugateGradient(iterations=3, rtol=0, products=products), loss)
    mlopt.hypergradient(problem)
    assert len(drawn_numbers) >= {"autograd": 1, "forward": 4, "finite_difference": 8}[products]
    assert len(set(drawn_numbers)) == 1
    mlopt.hypergradient(problem)
    assert len(set(drawn_numbers)) == 2


def test_levels_draw_independent_numbers() -> None:
    """Two levels must not share a mask because they share a seed."""
    seen: dict[str, float] = {}

    def outer(module: nn.Module, batch: None, *, y: nn.Module) -> Tensor:
        seen["x"] = random.random()
        return (module() * y()).sum()

    def inner(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
        seen["y"] = random.random()
        return (module() - x()).square().sum()

    mlopt.hypergradient(
        mlopt.Problem(
            mlopt.Level("x", mlopt.variables(torch.ones(2)), outer),
            mlopt.Level("y", mlopt.variables(torch.ones(2)), inner, estimator=mlopt.Identity()),
        )
    )
    assert seen["x"] != seen["y"]


def test_one_batch_serves_a_pullback() -> None:
    seen: list[float] = []

    def loss(module: nn.Module, batch: Tensor, *, weights: nn.Module) -> Tensor:
        seen.append(float(batch.sum()))
        return dropped(module, batch, weights=weights)

    problem = build(0, mlopt.ConjugateGradient(iterations=2, products="finite_difference"), loss)
    batches = [torch.full((8, 3), float(k)) for k in range(4)]
    levels = [mlopt.Level("network", problem["network"].module, loss, data=batches, estimator=mlopt.FiniteDifference())]
    problem = mlopt.Problem(problem["weights"], *levels)
    for k in range(3):
        seen.clear()
        mlopt.hypergradient(problem)
        assert set(seen) == {24.0 * k}
    seen.clear()
    mlopt.hypergradient(problem, {"network": batches[3]})
    assert set(seen) == {72.0}
