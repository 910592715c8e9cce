"""Small problems with traps for estimators: draws, masks, decorated modules, losses that are not finite."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor, nn

from ..problem import Estimator, Level, Problem, Variables

__all__ = ["Decorated", "Plain", "broken", "masked", "noisy", "regression"]


def noisy(estimator: Estimator, draws: list[tuple[float, float, float]]) -> Problem:
    """Return a problem whose inner loss records its draws from torch, Python and numpy."""

    def outer(module: nn.Module, batch: None, *, y: nn.Module) -> Tensor:
        value: Tensor = (module() * y()).sum()
        return value

    def inner(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
        draws.append((float(torch.rand(())), random.random(), float(np.random.rand())))
        pull = torch.rand(3, dtype=torch.float64) * x() * draws[-1][1]
        value: Tensor = module().square().sum() - (module() * pull).sum()
        return value

    start = torch.arange(1.0, 4.0, dtype=torch.float64)
    return Problem(Level("x", Variables(start), outer), Level("y", Variables(start / 2), inner, estimator=estimator))


def masked(estimator: Estimator, mask: Tensor | None, seen: list[list[list[bool]]]) -> Problem:
    """Return a regression whose inputs are dropped by a mask, given or drawn; every mask is recorded."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    targets = torch.randn(8, generator=generator, dtype=torch.float64)

    def outer(module: nn.Module, batch: None, *, network: nn.Module) -> Tensor:
        value: Tensor = (inputs @ network() - targets).square().mean()
        return value

    def inner(module: nn.Module, batch: None, *, weights: nn.Module) -> Tensor:
        kept = (torch.rand(8, 4, dtype=torch.float64) < 0.5) if mask is None else mask
        # As plain numbers: a tensor made inside a transform of torch.func must not outlive it.
        seen.append(kept.tolist())
        losses = ((inputs * kept) @ module() - targets).square()
        value: Tensor = (weights().sigmoid() * losses).mean() + module().square().sum()
        return value

    return Problem(
        Level("weights", Variables(torch.zeros(8, dtype=torch.float64)), outer),
        Level("network", Variables(torch.ones(4, dtype=torch.float64)), inner, estimator=estimator),
    )


class Plain(nn.Module):
    """A linear function of two features, with an offset."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.3, -0.5], dtype=torch.float64))
        self.offset = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return 1.5 * (inputs @ self.weight) + self.offset


class Decorated(nn.Module):
    """The same function of the same variables, with a frozen scale, a weight under two names, and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64), requires_grad=False)
        self.encoder, self.decoder, plain = nn.Module(), nn.Module(), Plain()
        self.encoder.weight = plain.weight
        self.decoder.weight = plain.weight
        self.offset = plain.offset

    def forward(self, inputs: Tensor) -> Tensor:
        halves = (inputs @ self.encoder.weight + inputs @ self.decoder.weight) / 2  # type: ignore[operator]
        result: Tensor = self.scale * halves + self.offset
        return result


def regression(estimator: Estimator, seed: int, kind: type[nn.Module]) -> Problem:
    """Return a weighted regression by a module of the given kind, with the same data for every kind."""
    generator = torch.Generator().manual_seed(seed)
    inputs, other = (torch.randn(6, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = torch.randn(6, generator=generator, dtype=torch.float64)

    def outer(module: nn.Module, batch: None, *, network: nn.Module) -> Tensor:
        value: Tensor = (network(other) - targets).square().mean()
        return value

    def inner(module: nn.Module, batch: None, *, weights: nn.Module) -> Tensor:
        value: Tensor = ((1 + weights().sigmoid()) * (module(inputs) - targets).square()).mean()
        return value

    return Problem(
        Level("weights", Variables(torch.zeros(6, dtype=torch.float64)), outer),
        Level("network", kind(), inner, estimator=estimator),
    )


def broken(estimator: Estimator, value: float) -> Problem:
    """Return a problem whose inner loss is `value` times a number above zero."""

    def outer(module: nn.Module, batch: None, *, broken: nn.Module) -> Tensor:
        value: Tensor = (module() * broken()).sum()
        return value

    def inner(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
        loss: Tensor = (module() - x()).square().sum() * value
        return loss

    start = torch.ones(2, dtype=torch.float64)
    return Problem(
        Level("x", Variables(2 * start), outer), Level("broken", Variables(start), inner, estimator=estimator)
    )
