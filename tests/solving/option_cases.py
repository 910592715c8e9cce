"""Problems, and pieces of their loops in plain torch, that the tests of solve share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from callback_cases import after_each_step
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader

import mlopt
from mlopt import Level, Problem, Variables, variables

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


def vector(*values: float) -> Variables:
    return variables(torch.tensor(values, dtype=F64))


class Weights(nn.Module):
    """Two weights that sum to one."""

    def __init__(self, logits: Sequence[float] = (0.3, -0.2), dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits, dtype=dtype))

    def forward(self) -> Tensor:
        return self.logits.softmax(0)


class RunningMean(nn.Module):
    """A scale of inputs around their running mean: a buffer that is None before the first batch, and is bound anew by each."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, dtype=F64))
        self.register_buffer("mean", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = x.mean() if self.mean is None else (self.mean + x.mean()) / 2
        return (x - self.mean) * self.scale + self.scale


def around_means(batches: Sequence[Sequence[float]], **options: Any) -> Problem:
    """Return a level with a running mean of its batches, inside another; the options are those of the outer level."""

    def outer(own: Any, batch: Any, *, net: Any) -> Tensor:
        return (net.scale - 1).square().sum() + own().square().sum()

    def inner(own: Any, batch: Tensor, *, weights: Any) -> Tensor:
        return (own(batch) - weights()).square().mean()

    sgd, rows = partial(SGD, lr=0.1), [torch.tensor(batch, dtype=F64) for batch in batches]
    return Problem(
        Level("weights", vector(1.0), outer, optimizer=sgd, **options),
        Level("net", RunningMean(), inner, data=rows, steps=2, optimizer=sgd, estimator=mlopt.Identity()),
    )


def end(problem: Problem) -> list[Tensor]:
    """Return copies of all variables."""
    return [p.detach().clone() for level in problem for p in level.parameters]


def training(own: Any, batch: Batch, *, decay: Any) -> dict[str, Tensor]:
    error = (own(batch[0]) - batch[1]).square().mean()
    return {"loss": error + (decay().exp() * own[0].weight.square()).sum(), "error": error.detach()}


def validation(own: Any, batch: Batch, *, net: Any) -> Tensor:
    return (net(batch[0]) - batch[1]).square().mean() + 0.1 * own().square().mean()


def make(inner: dict[str, Any], outer: dict[str, Any], dtype: torch.dtype = F64) -> Problem:
    """Return a problem with an identity estimator; the arguments are those of its levels."""
    return Problem(
        Level("decay", decay(dtype), **{"loss": validation, **outer}),
        Level("net", network(dtype), **{"loss": training, "estimator": mlopt.Identity(), **inner}),
    )


def nest(rule: mlopt.Estimator, seen: list[float | None] | None = None) -> Problem:
    """Return x(y), y(z, x), z(y) on scalars, with z solved inside y; `seen` receives the batches of z that are >= 100."""

    def top(own, batch, *, y):
        return (y() - batch).square().sum() + own().square().sum()

    def middle(own, batch, *, z, x):
        return (own() - x()).square().sum() + (z() * own()).sum() + 0.1 * batch * own().sum()

    def bottom(own, batch, *, y):
        if seen is not None and batch >= 100:
            seen.append(batch.item())
        return (own() - y()).square().sum() + 0.1 * batch * own().sum()

    def rows() -> DataLoader[Any]:
        return DataLoader(torch.arange(7.0, dtype=F64), batch_size=None, shuffle=True)

    slow = partial(SGD, lr=0.01)
    return Problem(
        Level("x", vector(1.0), top, data=rows(), optimizer=slow),
        Level("y", vector(1.0), middle, data=rows(), optimizer=slow, steps=2, estimator=mlopt.Dense()),
        Level("z", vector(1.0), bottom, data=rows(), optimizer=slow, steps=2, estimator=rule),
    )


def solve(problem: Problem, steps: int, folder: Path | None = None, **options: Any) -> mlopt.Solution:
    """Solve a problem with seed 0, and with a checkpoint in `folder` after each step."""
    saving = {} if folder is None else {"checkpoint": mlopt.Checkpoints(folder, every=1)}
    return mlopt.solve(problem, steps, **{"seed": 0, "progress": False, **saving, **options})


def steps_of(problem: Problem, steps: int, **arguments: Any) -> list[tuple[str, Any]]:
    """Solve a problem; return the level and the batch of each step."""
    taken: list[tuple[str, Any]] = []
    record = after_each_step(lambda name, run: taken.append((name, run.engine.gradients.batches[name])))
    mlopt.solve(problem, steps, callbacks=[record], progress=False, **arguments)
    return taken


def by_identity(net: nn.Module, own: Variables, cotangent: Sequence[Tensor], batch: Batch) -> Tensor:
    """Return -d/d(own) <grad_net training, cotangent>, in plain torch."""
    loss = training(net, batch, decay=own)["loss"]
    gradient = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
    inner = sum((g * v).sum() for g, v in zip(gradient, cotangent, strict=True))
    return -torch.autograd.grad(inner, own.value)[0]
