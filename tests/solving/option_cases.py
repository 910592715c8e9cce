"""A two-level problem and its loop written out in plain torch, for the tests of what a level can be told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import mlopt
from mlopt import Level, Problem, Variables, variables

__all__ = ["F64", "Batch", "by_identity", "data", "decay", "make", "network", "training", "validation"]

F64 = torch.float64
Batch = tuple[Tensor, Tensor]


def data(count: int, size: int, *, seed: int = 0, dtype: torch.dtype = F64) -> list[Batch]:
    """Return batches of (size, 3) and (size, 1)."""
    draws = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, generator=draws, dtype=dtype), torch.randn(size, 1, generator=draws, dtype=dtype))
        for _ in range(count)
    ]


def network(dtype: torch.dtype = F64) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 4, dtype=dtype), nn.Tanh(), nn.Linear(4, 1, dtype=dtype))


def decay(dtype: torch.dtype = F64) -> Variables:
    return variables(torch.full((4, 3), -1.0, dtype=dtype))


def training(own: Any, batch: Batch, *, decay: Any) -> dict[str, Tensor]:
    error = (own(batch[0]) - batch[1]).square().mean()
    return {"loss": error + (decay().exp() * own[0].weight.square()).sum(), "error": error.detach()}


def validation(own: Any, batch: Batch, *, net: Any) -> Tensor:
    return (net(batch[0]) - batch[1]).square().mean() + 0.1 * own().square().mean()


def make(inner: dict[str, Any], outer: dict[str, Any], dtype: torch.dtype = F64) -> Problem:
    """Return the problem, its hypergradient taken under identity; the arguments are those of its levels."""
    return Problem(
        Level("decay", decay(dtype), **{"loss": validation, **outer}),
        Level("net", network(dtype), **{"loss": training, "estimator": mlopt.Identity(), **inner}),
    )


def by_identity(net: nn.Module, own: Variables, cotangent: Sequence[Tensor], batch: Batch) -> Tensor:
    """Return -d/d(own) <grad_net training, cotangent>, in plain torch."""
    loss = training(net, batch, decay=own)["loss"]
    gradient = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
    inner = sum((g * v).sum() for g, v in zip(gradient, cotangent, strict=True))
    return -torch.autograd.grad(inner, own.value)[0]
