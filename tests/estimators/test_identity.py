"""`Identity` with the scale 0, which leaves a response out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core_cases import distance, gradient_of
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import mlopt
from mlopt.testing import quadratic


def problem(shape: str, scale: float, seed: int) -> mlopt.Problem:
    rules: dict[str, mlopt.Estimator] = dict.fromkeys(("y", "z"), mlopt.ConjugateGradient(iterations=20))
    closed = quadratic(shape, {**rules, "y": mlopt.Identity(scale=scale)}, seed=seed)
    return closed.problem


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", ["two", "chain_of_three", "nested"])
def test_a_scale_of_zero_is_the_end_of_the_line_through_two_others(shape: str, seed: int) -> None:
    # The hypergradient is an affine function of the scale of one level.
    none, half, one = (gradient_of(problem(shape, scale, seed)) for scale in (0.0, 0.5, 1.0))
    assert distance(none, 2 * half - one) < 1e-12


class Once(torch.autograd.Function):
    """x, with a backward that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def test_it_takes_no_product() -> None:
    def inner(module: nn.Module, batch: object, *, weights: nn.Module) -> Tensor:
        return Once.apply((module() - weights()).square().sum())

    def outer(weights: nn.Module, batch: object, *, network: nn.Module) -> Tensor:
        return weights().square().sum() + network().sum()

    def own(scale: float) -> mlopt.Problem:
        weights, network = (mlopt.variables(torch.ones(2)) for _ in range(2))
        return mlopt.Problem(
            mlopt.Level("weights", weights, outer),
            mlopt.Level("network", network, inner, estimator=mlopt.Identity(scale=scale)),
        )

    assert torch.equal(gradient_of(own(0.0)), torch.full((2,), 2.0))
    assert mlopt.hypergradient(own(0.0)).reports["network"].stationarity is None
    with pytest.raises(mlopt.EstimatorError):
        gradient_of(own(1.0))


def test_a_cotangent_that_is_not_finite_raises() -> None:
    def inner(module: nn.Module, batch: object, *, weights: nn.Module) -> Tensor:
        return (module() - weights()).square().sum()

    def outer(weights: nn.Module, batch: object, *, network: nn.Module) -> Tensor:
        # Finite, with the derivative 0 x infinity.
        return weights().sum() + (0.0 * network()).abs().sqrt().sum()

    weights, network = (mlopt.variables(torch.ones(2)) for _ in range(2))
    own = mlopt.Problem(
        mlopt.Level("weights", weights, outer),
        mlopt.Level("network", network, inner, estimator=mlopt.Identity(scale=0.0)),
    )
    with pytest.raises(mlopt.NonFiniteError):
        mlopt.hypergradient(own)


def test_a_diagnosis_says_that_the_response_is_left_out() -> None:
    assert "leaves the response of the level out" in str(mlopt.diagnose(problem("two", 0.0, 0)))
