"""A problem with every kind of state that could move, and snapshots to detect it."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..problem import Estimator, Level, Problem, Variables
from ..rng import preserved

__all__ = ["same", "snapshot", "stateful_problem", "train_a_little"]


class _Restless(nn.Module):
    """A network in train mode with BatchNorm and two buffers; its forward changes one in place and replaces the other."""

    in_place: Tensor
    replaced: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.register_buffer("in_place", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(4))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(self.first(inputs))
        self.in_place += 1
        self.replaced = self.replaced + hidden.detach().mean(0)
        result: Tensor = self.last(nn.functional.dropout(torch.tanh(hidden), 0.5)).squeeze(1)
        return result


def stateful_problem(estimator: Estimator, *, dtype: torch.dtype = torch.float64, fatal: int | None = None) -> Problem:
    """Return sample weights for a network with BatchNorm, dropout, other buffers, and a loss that draws from every generator.

    Args:
        estimator: the estimator of the network's level.
        dtype: dtype of all variables.
        fatal: the evaluation of the network's loss, counted from one, that raises a `FloatingPointError`; None for none.

    Returns:
        The problem of levels `weights` and `network`.

    Example:
        >>> from mlopt.testing import same, snapshot, stateful_problem
        >>> before = snapshot(problem := stateful_problem(mlopt.Identity()))
        >>> result = mlopt.hypergradient(problem)
        >>> same(before, snapshot(problem))
        True
    """
    with preserved():
        torch.manual_seed(0)
        network = _Restless().to(dtype)
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in ((8, 3), (8,))
    )
    calls = 0

    def training(network: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
        nonlocal calls
        calls += 1
        noise = random.random() + float(np.random.rand()) + torch.rand(len(targets), dtype=dtype)
        losses = (network(inputs) - targets + 0.01 * noise).square()
        if calls == fatal:
            raise FloatingPointError
        ridge = torch.stack([p.square().sum() for p in network.parameters()]).sum()
        value: Tensor = (weights().sigmoid() * losses).mean() + ridge
        return value

    def validation(weights: nn.Module, batch: Any, *, network: nn.Module) -> Tensor:
        value: Tensor = (network(inputs) - targets).square().mean() + 0.1 * weights().square().sum()
        return value

    return Problem(
        Level("weights", Variables(torch.zeros(8, dtype=dtype)), validation),
        Level("network", network, training, data=[None], estimator=estimator),
    )


def train_a_little(problem: Problem) -> list[torch.optim.Optimizer]:
    """Take one step of each level along a made-up gradient; return the optimisers. Only the last level's `.grad` is cleared."""
    optimizers: list[torch.optim.Optimizer] = []
    for level in problem:
        optimizer = torch.optim.Adam(level.parameters, lr=1e-3)
        for parameter in level.parameters:
            parameter.grad = torch.full_like(parameter, 0.3)
        optimizer.step()
        optimizers.append(optimizer)
    for parameter in problem.levels[-1].parameters:
        parameter.grad = None
    return optimizers


def snapshot(problem: Problem, optimizers: Sequence[torch.optim.Optimizer] = ()) -> dict[str, Any]:
    """Return copies of everything that a hypergradient could move, with the identities of the tensors."""
    state: dict[str, Any] = {
        "generator of torch": torch.get_rng_state(),
        "generator of Python": random.getstate(),
        "generator of numpy": np.random.get_state(),
        "optimizers": copy.deepcopy([o.state_dict()["state"] for o in optimizers]),
    }
    for level in problem:
        tensors = {**dict(level.module.named_parameters()), **dict(level.module.named_buffers())}
        for name, tensor in tensors.items():
            state[f"{level.name}.{name}"] = (
                id(tensor),
                tensor.data_ptr(),
                tensor.requires_grad,
                tensor.detach().clone(),
            )
        for name, parameter in level.module.named_parameters():
            state[f"{level.name}.{name}.grad"] = None if parameter.grad is None else parameter.grad.clone()
        state[f"{level.name}.modes"] = [m.training for m in level.module.modules()]
    return state


def same(a: Any, b: Any) -> bool:
    """Return True if two snapshots are bit-equal."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
