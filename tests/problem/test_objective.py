"""An objective is the sum of its terms, and every evaluation of a loss or regularizer goes through one function."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from core_cases import point_of
from torch import Tensor, nn
from torch.optim import SGD, Adam

import mlopt
from mlopt.estimators.products import PRODUCTS, SecondDerivatives
from mlopt.problem import Objective, evaluate_loss, evaluate_regularizer


class Simplex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.3, -0.2]))

    def forward(self) -> Tensor:
        return self.logits.softmax(0)


def held_out(weights: nn.Module, batch: Tensor, *, network: nn.Module) -> Tensor:
    return (network(batch).square().mean() - 1).square() + weights()[0]


def mixture(network: nn.Module, batch: Tensor, *, weights: nn.Module) -> mlopt.Mixture:
    return mlopt.Mixture([lambda k=k: (network(batch) - k).square().mean() for k in range(2)], weights="weights")


def plain(network: nn.Module, batch: Tensor, *, weights: nn.Module) -> Tensor:
    w = weights()
    return w[0] * network(batch).square().mean() + w[1] * (network(batch) - 1).square().mean()


def ridge(network: nn.Module, *, weights: nn.Module) -> Tensor:
    return weights.logits.exp().sum() * sum(p.square().sum() for p in network.parameters())


def shrink(weights: nn.Module) -> Tensor:
    return weights.logits.square().sum()


def build(
    estimator: mlopt.Estimator, loss: Callable[..., Any] = mixture, wrap: Any = lambda f, gate: f
) -> mlopt.Problem:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    outer = mlopt.Level(
        "weights",
        Simplex(),
        wrap(held_out, evaluate_loss),
        data=[torch.randn(4, 3)],
        optimizer=partial(Adam, lr=0.01),
        regularizer=wrap(shrink, evaluate_regularizer),
    )
    inner = mlopt.Level(
        "network",
        network,
        wrap(loss, evaluate_loss),
        data=[torch.randn(5, 3), torch.randn(5, 3)],
        optimizer=partial(SGD, lr=0.1),
        steps=2,
        estimator=estimator,
        regularizer=wrap(ridge, evaluate_regularizer),
    )
    return mlopt.Problem(outer, inner)


USES: dict[str, Callable[[mlopt.Problem], Any]] = {
    "hypergradient": mlopt.hypergradient,
    "solve": partial(mlopt.solve, steps=3, progress=False),
    "lookahead": partial(mlopt.solve, steps=2, lookahead=True, progress=False),
    "check against the dense oracle": partial(mlopt.check_hypergradient, tolerance=1e9),
    "check against resolved levels": partial(mlopt.check_hypergradient, oracle="resolve", tolerance=1e9, directions=1),
    "diagnose": mlopt.diagnose,
}
RULES: dict[str, Callable[[], mlopt.Estimator]] = {
    "autograd": lambda: mlopt.ConjugateGradient(iterations=2),
    "forward": lambda: mlopt.ConjugateGradient(iterations=2, products="forward"),
    "finite difference": mlopt.FiniteDifference,
    "gauss-newton": lambda: mlopt.ConjugateGradient(iterations=2, products="gauss_newton"),
    "streamed": lambda: mlopt.Identity(streamed=True),
    "value function": lambda: mlopt.ValueFunction(steps=2),
    "unrolled": lambda: mlopt.Unrolled(steps=2),
}


@pytest.mark.parametrize("loss", [mixture, plain])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("use", USES)
def test_every_evaluation_goes_through_the_gate(use: str, rule: str, loss: Callable[..., Any]) -> None:
    if rule == "unrolled":
        pytest.importorskip("torchopt")
    evaluations: Counter[tuple[str, bool]] = Counter()

    def wrap(function: Callable[..., Any], gate: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # the references are read from the original
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            evaluations[function.__name__, sys._getframe(1).f_code is gate.__code__] += 1
            return function(*args, **kwargs)

        return wrapped

    USES[use](build(RULES[rule](), loss, wrap))
    assert set(evaluations) == {(f.__name__, True) for f in (held_out, loss, ridge, shrink)}


def parts() -> tuple[Objective, Callable[[Tensor], Tensor], Tensor]:
    """Return the objective of the network, the same objective as a function of one vector, and the point."""
    problem = build(mlopt.Identity(), plain)
    point = point_of(problem)
    network, weights = problem["network"], problem["weights"]
    shapes = [*network.parameters, *weights.parameters]
    (batch,) = (point.batches["network"],)

    def function(flat: Tensor) -> Tensor:
        pieces = torch.split(flat, [p.numel() for p in shapes])
        a, b, c, d, logits = (piece.view_as(p) for piece, p in zip(pieces, shapes, strict=True))
        outputs, w = (batch @ a.T + b).tanh() @ c.T + d, logits.softmax(0)
        fit = w[0] * outputs.square().mean() + w[1] * (outputs - 1).square().mean()
        return fit + logits.exp().sum() * torch.stack([p.square().sum() for p in (a, b, c, d)]).sum()

    return Objective.of(network, point), function, torch.cat([p.detach().reshape(-1) for p in shapes])


def flat(by_block: Any) -> Tensor:
    return torch.cat([x.reshape(-1) for block in ("network", "weights") for x in by_block[block]])


def test_value_and_derivatives_are_sums_over_the_terms() -> None:
    objective, function, at = parts()
    assert len(objective.terms) == 2
    expected = function(at)
    assert torch.allclose(objective.value(), expected)
    assert objective.number() == pytest.approx(float(expected))
    gradient = flat(objective.derivatives(["network", "weights", "elsewhere"]))
    assert torch.allclose(gradient, torch.func.grad(function)(at))


@pytest.mark.parametrize("kind", ["autograd", "forward", "finite_difference"])
def test_products_are_sums_over_the_terms(kind: str) -> None:
    objective, function, at = parts()
    direction = torch.randn(len(at), generator=torch.Generator().manual_seed(1))
    values = {block: objective.terms[0].values[block] for block in ("network", "weights")}
    pieces = iter(torch.split(direction, [p.numel() for vectors in values.values() for p in vectors]))
    along = {block: tuple(next(pieces).view_as(p) for p in vectors) for block, vectors in values.items()}
    products = SecondDerivatives(objective, PRODUCTS[kind])
    expected = torch.func.jvp(torch.func.grad(function), (at,), (direction,))[1]
    # Differences of first derivatives at a relative step of 1e-5 have an error of its square.
    assert torch.allclose(flat(products(along, ["network", "weights"])), expected, rtol=1e-6, atol=1e-7)
    assert (products.step is not None) == (kind == "finite_difference")
    gradient = torch.func.grad(function)(at)
    assert torch.allclose(flat({block: products.gradient(block) for block in values}), gradient)
