"""Resources of virtual steps: nothing waits for the garbage collector, and the host seldom waits for the device."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

import mlopt
from benchmarks.hypergrad.measuring import peak_memory


def build(estimator: mlopt.Unrolled, layers: int = 2) -> mlopt.Problem:
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))

    def inner(module: nn.Module, batch: None, *, outer: nn.Module) -> Tensor:
        return (module(inputs).tanh() * outer()).square().mean()

    def outer(module: nn.Module, batch: None, *, inner: nn.Module) -> Tensor:
        return inner(-inputs).square().mean()

    network = nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers)))
    return mlopt.Problem(
        mlopt.Level("outer", mlopt.variables(torch.ones(3)), outer),
        mlopt.Level("inner", network, inner, optimizer=partial(SGD, lr=0.1, momentum=0.9), estimator=estimator),
    )


@pytest.mark.parametrize("every", [1, None])
@pytest.mark.parametrize("products", ["autograd", "finite_difference"])
def test_steps_leave_no_reference_cycle(products: str, every: int | None) -> None:
    """A cycle would keep every x_t and its graph until the collector runs. (torch.func leaves cycles of its own.)"""
    problem = build(mlopt.Unrolled(steps=6, checkpoint_every=every, products=products))
    mlopt.hypergradient(problem)
    gc.collect()
    gc.disable()
    try:
        mlopt.hypergradient(problem)
        assert gc.collect() == 0
    finally:
        gc.enable()


class Waits(TorchDispatchMode):
    """Count the scalars that the host reads."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_the_host_does_not_wait_for_every_tensor() -> None:
    counts = []
    for layers in (1, 8):
        problem = build(mlopt.Unrolled(steps=3), layers)
        with Waits() as waits:
            mlopt.hypergradient(problem, seed=0)
        counts.append(waits.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("steps", "copies"), [(32, 15), (128, 24)])
def test_the_memory_of_sgd_is_that_of_the_least_checkpoints(steps: int, copies: int) -> None:
    """A held step has its x_t and no gradient, so sqrt(2 T) copies of the parameters suffice, and a few vectors."""
    network, inputs = nn.Linear(2_000, 100), torch.randn(20, 2_000)

    def inner(module: nn.Module, batch: None, *, outer: nn.Module) -> Tensor:
        return (module(inputs).tanh().square().mean(1) * outer()).mean()

    def outer(module: nn.Module, batch: None, *, inner: nn.Module) -> Tensor:
        return inner(inputs).square().mean()

    rule = mlopt.Unrolled(steps=steps)
    problem = mlopt.Problem(
        mlopt.Level("outer", mlopt.variables(torch.ones(20)), outer),
        mlopt.Level("inner", network, inner, optimizer=partial(SGD, lr=0.1), estimator=rule),
    )
    mlopt.hypergradient(problem)
    size = sum(p.numel() * p.element_size() for p in network.parameters())
    assert peak_memory(lambda: mlopt.hypergradient(problem), "cpu") < copies * size
