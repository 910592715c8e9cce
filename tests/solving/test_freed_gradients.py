"""Pullbacks free `.grad` of the levels inside where nothing reads it, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam

import mlopt
from benchmarks.hypergrad.measuring import peak_memory
from benchmarks.scale import network, reweighting
from mlopt.testing import quadratic

ESTIMATORS: dict[str, Callable[[], mlopt.Estimator]] = {
    "identity": mlopt.Identity,
    "forward": partial(mlopt.Identity, products="forward"),
    "differences": mlopt.FiniteDifference,
    "sama": mlopt.SAMA,
}


class Reader(mlopt.Callback):
    """A callback that may read `.grad`."""


class Sleeper(mlopt.Callback):
    """A callback that says that it reads none."""

    reads_gradients = False


def of(estimator: mlopt.Estimator, variables: float = 1e4) -> mlopt.Problem:
    weights, net = reweighting(network(variables), estimator).levels
    adam = partial(Adam, lr=1e-2, weight_decay=0.1)
    return mlopt.Problem(
        mlopt.Level("weights", weights.module, weights.definition, data=weights.data, optimizer=adam),
        mlopt.Level("net", net.module, net.definition, data=net.data, optimizer=adam, estimator=estimator, steps=2),
    )


def run(problem: mlopt.Problem, *callbacks: mlopt.Callback, steps: int = 4, **options: Any) -> tuple[list[Tensor], Any]:
    solution = mlopt.solve(problem, steps, seed=0, progress=False, callbacks=callbacks, **options)
    return [p.detach().clone() for level in problem for p in level.parameters], solution


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_run_and_its_reports_are_the_same(name: str, lookahead: bool) -> None:
    kept, first = run(of(ESTIMATORS[name]()), Reader(), lookahead=lookahead)
    freed, second = run(of(ESTIMATORS[name]()), lookahead=lookahead)
    assert all(map(torch.equal, kept, freed))
    assert list(first.history) == list(second.history)
    for field in ("gradient_norm", "stationarity", "remarks"):
        assert getattr(first.reports["net"], field) == getattr(second.reports["net"], field)
    assert first.reports["net"].gradient_norm > 0


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_peak_falls_by_one_vector(name: str) -> None:
    def peak(*callbacks: mlopt.Callback) -> int:
        problem = of(ESTIMATORS[name](), 5e4)
        return peak_memory(lambda: run(problem, *callbacks, steps=2), "cpu")

    vector = sum(4 * p.numel() for p in of(mlopt.Identity(), 5e4)["net"].parameters)
    assert peak(Reader()) - peak(Sleeper()) == pytest.approx(vector, rel=0.05)


def test_the_gradient_stays_for_a_callback_and_that_of_the_outermost_level_always() -> None:
    for callbacks, kept in ((), False), ((Sleeper(),), False), ((Reader(),), True), ((Sleeper(), Reader()), True):
        problem = of(mlopt.Identity())
        run(problem, *callbacks)
        assert all((p.grad is not None) == kept for p in problem["net"].parameters)
        assert problem["weights"].parameters[0].grad is not None


def test_a_linear_solve_keeps_the_gradient() -> None:
    """Its report may read it after the solve."""
    problem = of(mlopt.ConjugateGradient(iterations=2, damping=1.0))
    run(problem)
    assert all(p.grad is not None for p in problem["net"].parameters)


@pytest.mark.parametrize("products", ["autograd", "forward"])
def test_a_level_in_a_nest_is_measured_at_each_pullback(products: str) -> None:
    """The level around it pulls back through it first, and the outermost one afterwards."""

    def of_all(*callbacks: mlopt.Callback) -> dict[str, float | None]:
        levels = [
            mlopt.Level(o.name, o.module, o.definition, optimizer=partial(SGD, lr=0.01), estimator=o.estimator)
            for o in quadratic("nested", mlopt.Identity(products=products)).problem
        ]
        _, solution = run(mlopt.Problem(*levels), *callbacks)
        return {name: report.gradient_norm for name, report in solution.reports.items()}

    kept = of_all(Reader())
    assert len(kept) == 2
    assert None not in kept.values()
    assert of_all() == kept
