"""Estimators, small problems and counters that several tests of the core use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mlopt
from mlopt.problem import Block, Carryover, Linearization, Point, Vectors, Workspace
from mlopt.tensors import Tensors

PRODUCTS = ("autograd", "forward", "finite_difference")

seeds = st.integers(0, 10_000)


def drawn(examples: int) -> settings:
    """Return the settings of a drawn test, without a deadline: the first example compiles."""
    return settings(max_examples=examples, deadline=None)


def conjugate_gradient(products: str = "autograd") -> mlopt.Implicit:
    """Return conjugate gradients run to convergence; rounding over the step limits finite differences."""
    rtol = 1e-9 if products == "finite_difference" else 1e-13
    return mlopt.ConjugateGradient(iterations=200, rtol=rtol, products=products)


#: Every named estimator, by name, as a function of the products.
ESTIMATORS: dict[str, Callable[[str], mlopt.Implicit]] = {
    "identity": lambda products: mlopt.Identity(products=products),
    "neumann": lambda products: mlopt.Neumann(iterations=3, products=products),
    "conjugate_gradient": lambda products: mlopt.ConjugateGradient(iterations=3, products=products),
    "dense": lambda products: mlopt.Dense(products=products, damping=1e-3),
}


def flat(gradient: Mapping[str, Tensor]) -> Tensor:
    """Return all parameters of a gradient in one vector."""
    return torch.cat([g.reshape(-1) for g in gradient.values()])


def distance(value: Tensor, expected: Tensor) -> float:
    """Return ||value - expected|| / ||expected||."""
    return float((value - expected).norm() / expected.norm())


def gradient_of(problem: mlopt.Problem, **arguments: Any) -> Tensor:
    """Return a hypergradient in one vector."""
    return flat(mlopt.hypergradient(problem, **arguments).gradient)


def point_of(problem: mlopt.Problem, warm: dict[str, Tensors] | None = None) -> Point:
    """Return a point at seed 0, with each level's first batch."""
    batches = {level.name: None if level.data is None else next(iter(level.data)) for level in problem}
    generators = {level.name: mlopt.rng.GeneratorState.seeded(0) for level in problem}
    return Point(problem, batches, generators, carryover=None if warm is None else Carryover(warm=warm))


def contents(workspace: Workspace) -> dict[str, Any]:
    """Return copies of everything that a workspace keeps, for `same`."""
    keys = [sorted(workspace.mixtures.items()), sorted(workspace.compiled), sorted(workspace.verified)]
    return {"standalone": workspace.state_dict(), "caches": keys}


class Counting(mlopt.Estimator):
    """An estimator that counts the linearisations and pullbacks of each level."""

    def __init__(self, inner: mlopt.Implicit) -> None:
        self.inner = inner
        self.linearizations: Counter[str] = Counter()
        self.pullbacks: Counter[str] = Counter()

    def linearize(self, point: Point, level: str) -> Linearization:
        self.linearizations[level] += 1
        return _CountingLinearization(self, level, self.inner.linearize(point, level))


class _CountingLinearization(Linearization):
    def __init__(self, owner: Counting, level: str, inner: Linearization) -> None:
        self._owner, self._level, self._inner = owner, level, inner
        self.blocks, self.arguments, self.report = inner.blocks, inner.arguments, inner.report

    def pullback(self, cotangent: Vectors, wanted: Sequence[str] | None = None) -> dict[Block, Tensors]:
        self._owner.pullbacks[self._level] += 1
        return self._inner.pullback(cotangent, wanted)


class Calls:
    """A loss that counts how often it is evaluated."""

    def __init__(self, loss: Callable[..., Any]) -> None:
        self.count = 0
        self.__wrapped__ = loss  # inspect.signature reads it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return self.__wrapped__(*args, **kwargs)


def squared(module: nn.Module, batch: Any) -> Tensor:
    """A loss without references: the sum of squares of the module's output."""
    return module().square().sum()


class Restless(nn.Module):
    """A module in train mode, with BatchNorm, dropout and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 1))
        self.unused = nn.Parameter(torch.ones(1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.body(inputs).squeeze(1)
