"""SGD's step in closed form: torch's own step, and its transpose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core_cases import drawn, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import SGD

from mlopt.estimators.sgd_step import SGDStep
from mlopt.tensors import Tensors

SHAPES = [(2, 3), (), (4,)]
GROUPS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.3},
    "decay": {"lr": 0.3, "weight_decay": 0.2, "maximize": True},
    "momentum": {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.1},
    "dampened": {"lr": 0.3, "momentum": 0.9, "dampening": 0.4, "maximize": True},
    "nesterov": {"lr": 0.3, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
}


def vectors(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) for shape in SHAPES)


def inner(a: Tensors, b: Tensors) -> Tensor:
    return sum((x * y).sum() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", GROUPS)
@drawn(10)
@given(seed=seeds, before=st.integers(0, 2))
def test_the_step_is_that_of_torch(name: str, seed: int, before: int) -> None:
    """From a fresh optimiser, and from one that took steps."""
    parameters = [torch.nn.Parameter(x.clone()) for x in vectors(seed)]
    optimizer = SGD(parameters, **GROUPS[name])

    def real(k: int) -> None:
        for parameter, gradient in zip(parameters, vectors(seed + 1 + k), strict=True):
            parameter.grad = gradient
        optimizer.step()

    for k in range(before):
        real(k)
    step = SGDStep.of(optimizer.param_groups[0], live=before > 0)
    x: Tensors = tuple(p.detach().clone() for p in parameters)
    state = step.initial(x, [dict(optimizer.state[p]) for p in parameters])
    state = tuple(m.clone() for m in state)
    for k in range(3):
        real(before + k)
        x, state = step(k, x, vectors(seed + 1 + before + k), state)
        for own, parameter in zip(x, parameters, strict=True):
            torch.testing.assert_close(own, parameter.detach(), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("number", [0, 3])
@drawn(10)
@given(seed=seeds, live=st.booleans(), held=st.booleans())
def test_the_pull_is_the_transpose_of_the_step(name: str, number: int, seed: int, live: bool, held: bool) -> None:
    """<pull(a), t> = <a, step(t)> for all cotangents a and all t, since the step is linear."""
    defaults = {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
    step = SGDStep.of({**defaults, **GROUPS[name]}, live=live)
    x, g, cotangent, on_state = (vectors(seed + k) for k in range(4))
    state: Tensors = ()
    if step.momentum:
        # A fresh optimiser has no momenta before its first step.
        state = tuple((number > 0 or live) * m for m in vectors(seed + 4))
    moved, after = step(number, x, g, state)
    memory = on_state if held and step.momentum else ()
    pulled, along, back = step.pull(number, cotangent, memory)
    expected = inner(cotangent, moved) + (inner(memory, after) if memory else 0.0)
    actual = inner(pulled, x) + inner(along, g) + (inner(back, state) if state else 0.0)
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), rtol=1e-12, atol=1e-12)
