"""Unrolled steps: equal to torch's own, exact in reverse, and gone afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from core_cases import PRODUCTS, distance, drawn, flat, gradient_of, point_of, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, RMSprop

import mlopt
from mlopt.hypergradient import lookahead

torchopt = pytest.importorskip("torchopt")

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(SGD, lr=0.2),
    "momentum": partial(SGD, lr=0.1, momentum=0.9),
    "dampened": partial(SGD, lr=0.2, momentum=0.9, dampening=0.4),
    "nesterov": partial(SGD, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.1),
    "decay": partial(SGD, lr=0.1, weight_decay=0.2, maximize=True),
    "adam": partial(Adam, lr=0.05),
    "adam_decay": partial(Adam, lr=0.05, betas=(0.7, 0.9), eps=1e-3, weight_decay=0.1),
    "adamw": partial(AdamW, lr=0.05, weight_decay=0.3),
    "adamw_maximize": partial(AdamW, lr=0.05, maximize=True),
}


class Net(nn.Module):
    """A small network with a parameter that nothing uses, and a frozen one."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
            self.unused, self.frozen = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(1), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.frozen * self.body(inputs)).squeeze(1)


def training_loss(net: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
    inputs, targets = batch
    return (weights().sigmoid() * (net(inputs) - targets).square()).mean()


def validation_loss(weights: nn.Module, batch: Any, *, net: Net) -> Tensor:
    inputs, targets = batch
    return (net(inputs) - targets).square().mean() + net.unused.square().sum() + 0.1 * weights().square().sum()


def build(
    seed: int, estimator: mlopt.Estimator, optimizer: Any = None, *, net: nn.Module | None = None
) -> mlopt.Problem:
    generator = torch.Generator().manual_seed(seed)
    training, validation = ((torch.randn(4, 2, generator=generator), torch.randn(4, generator=generator)) for _ in "ab")
    weights = mlopt.variables(torch.randn(4, generator=generator))
    return mlopt.Problem(
        mlopt.Level("weights", weights, validation_loss, data=[validation], optimizer=partial(SGD, lr=0.1)),
        mlopt.Level(
            "net", net or Net(seed), training_loss, data=[training], estimator=estimator, optimizer=optimizer, steps=2
        ),
    )


def real_steps(problem: mlopt.Problem, optimizer: torch.optim.Optimizer, steps: int, name: str = "net") -> None:
    """Take steps of a real optimiser of the level."""
    level = problem[name]
    for _ in range(steps):
        optimizer.zero_grad()
        others = {reference: problem[reference].module for reference in level.references}
        batch = None if level.data is None else level.data[0]
        level.loss(level.module, batch, **others).backward(inputs=list(level.parameters))
        optimizer.step()


def outer_value(problem: mlopt.Problem, steps: int, warmed: int = 0) -> Tensor:
    """Return F(u, x_T(u)), by steps of torch's own optimisers on a copy."""
    problem = copy.deepcopy(problem)
    optimizer = problem["net"].optimizer
    optimizer = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer(problem["net"].parameters)
    real_steps(problem, optimizer, steps)
    outer = problem["weights"]
    return outer.loss(outer.module, outer.data[0], net=problem["net"].module).detach()


def differences(function: Callable[[], Tensor], variable: Tensor, step: float = 1e-5) -> Tensor:
    """Return the gradient of a function of a live variable by central differences."""
    gradient = torch.zeros_like(variable)
    for index in range(variable.numel()):
        values = []
        kept = variable.detach().clone()
        for sign in (1, -1):
            variable.data.view(-1)[index] += sign * step
            values.append(function())
            variable.data.copy_(kept)
        gradient.view(-1)[index] = (values[0] - values[1]) / (2 * step)
    return gradient


@pytest.mark.parametrize("name", OPTIMIZERS)
@drawn(4)
@given(seed=seeds, steps=st.integers(1, 5))
def test_virtual_steps_are_those_of_torch(name: str, seed: int, steps: int) -> None:
    """From a fresh optimiser and from one at work, whose state some parameters may lack."""
    for warmed in (0, 2):
        problem = build(seed, mlopt.Unrolled(steps), OPTIMIZERS[name])
        optimizer = OPTIMIZERS[name](problem["net"].parameters)
        real_steps(problem, optimizer, warmed)
        point = point_of(problem)
        point.optimizers = {"net": optimizer}
        with lookahead(point, problem.outermost):
            virtual = [p.detach().clone() for p in problem["net"].parameters]
        real_steps(problem, optimizer, steps)
        for found, expected in zip(virtual, problem["net"].parameters, strict=True):
            torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
@drawn(3)
@given(seed=seeds, steps=st.integers(1, 6), every=st.sampled_from([1, 2, None]))
def test_the_hypergradient_is_the_derivative_through_the_steps(name: str, seed: int, steps: int, every: Any) -> None:
    problem = build(seed, mlopt.Unrolled(steps, checkpoint_every=every), OPTIMIZERS[name])
    found = mlopt.hypergradient(problem)
    torch.testing.assert_close(found.loss, outer_value(problem, steps), rtol=1e-12, atol=0)
    expected = differences(lambda: outer_value(problem, steps), problem["weights"].module.value)
    assert distance(found.gradient["value"], expected) < 1e-6


@pytest.mark.parametrize("name", ["momentum", "dampened", "adam", "adamw"])
def test_an_optimizer_at_work_is_gone_on_from(name: str) -> None:
    problem = build(3, mlopt.Unrolled(4))
    optimizer = OPTIMIZERS[name](problem["net"].parameters)
    real_steps(problem, optimizer, 3)
    optimizer.param_groups[0]["lr"] *= 0.5
    problem = build(3, mlopt.Unrolled(4), optimizer, net=problem["net"].module)
    found, fresh = (
        gradient_of(problem),
        gradient_of(build(3, mlopt.Unrolled(4), OPTIMIZERS[name], net=problem["net"].module)),
    )
    expected = differences(lambda: outer_value(problem, 4), problem["weights"].module.value)
    assert distance(found, expected) < 1e-6
    assert distance(fresh, expected) > 1e-3
