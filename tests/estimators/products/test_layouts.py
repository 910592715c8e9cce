"""Compiled products where a direction, a parameter or a buffer changes its strides, shape or dtype between calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from core_cases import distance, gradient_of
from torch import Tensor, nn

import mlopt

INPUTS = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
COSTS = torch.arange(9.0, dtype=torch.float64).reshape(3, 3)
#: Validation losses whose gradients by a matrix are dense, expanded and transposed.
OUTER: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda matrix: (matrix * COSTS).sum(),
    "expanded": lambda matrix: matrix.sum(),
    "transposed": lambda matrix: (matrix.t() * COSTS).sum(),
}


class Scaled(nn.Module):
    """A matrix, applied to inputs that a buffer scales."""

    scales: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(COSTS.cos())
        self.register_buffer("scales", torch.ones(3, 1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scales) @ self.matrix


def relayout(module: Scaled) -> None:
    module.matrix.data = module.matrix.data.t().contiguous().t()


def expand(module: Scaled) -> None:
    module.scales = torch.full((1, 3), 1.7, dtype=torch.float64).expand(3, 3)


def narrow(module: Scaled) -> None:
    module.scales = torch.full((3, 1), 1.7)


def problem_of(network: Scaled, rule: Any) -> mlopt.Problem:
    def outer(weights: nn.Module, batch: str, *, network: nn.Module) -> Tensor:
        return OUTER[batch](network.matrix)

    def inner(module: nn.Module, inputs: Tensor, *, weights: nn.Module) -> Tensor:
        return (module(inputs) - 1).square().mean() * weights().exp().sum() + 0.1 * module.matrix.square().sum()

    return mlopt.Problem(
        mlopt.Level("weights", mlopt.variables(torch.zeros(2, dtype=torch.float64)), outer, data=list(OUTER)),
        mlopt.Level("network", network, inner, data=[INPUTS], estimator=rule),
    )


def identity(**options: Any) -> mlopt.Identity:
    return mlopt.Identity(**options)


def gradients(**options: Any) -> mlopt.ConjugateGradient:
    return mlopt.ConjugateGradient(iterations=3, **options)


@pytest.mark.parametrize("change", [None, relayout, expand, narrow])
@pytest.mark.parametrize("rule", [identity, gradients])
def test_layouts_may_change(rule: Any, change: Callable[[Scaled], None] | None) -> None:
    network = Scaled()
    compiled, live = problem_of(network, rule(compile=True)), problem_of(network, rule())
    for batch in ("expanded", "dense", "transposed", "expanded"):
        one, other = (gradient_of(problem, batches={"weights": batch}) for problem in (compiled, live))
        assert distance(one, other) < 1e-12
        if change is not None and batch == "expanded":
            change(network)
