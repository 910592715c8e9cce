"""Batches of their own for the Hessian."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from core_cases import distance, drawn, gradient_of, seeds
from hypothesis import given
from torch import Tensor, nn
from torch.optim import SGD

import mlopt
from mlopt.estimators import LinearSolve
from mlopt.testing import quadratic


def ridge(module: nn.Module, batch: Tensor, *, shift: nn.Module) -> Tensor:
    """Return sum over rows a of (<a, x> - <a, shift>)^2 / 2, plus ||x||^2 / 2: the Hessian is A^T A + I."""
    return (batch @ (module() - shift())).square().sum() / 2 + module().square().sum() / 2


def outer(module: nn.Module, batch: Any, *, x: nn.Module) -> Tensor:
    return x().square().sum() / 2


def problem_of(curvature: Any, rows: Tensor, estimator: Any = mlopt.linear.Dense) -> mlopt.Problem:
    torch.manual_seed(1)
    rule = LinearSolve(solver=estimator(), curvature_data=curvature)
    return mlopt.Problem(
        mlopt.Level("shift", mlopt.variables(torch.randn(3)), outer, optimizer=partial(SGD, lr=0.1)),
        mlopt.Level(
            "x", mlopt.variables(torch.randn(3)), ridge, data=[rows], optimizer=partial(SGD, lr=0.01), estimator=rule
        ),
    )


def expected(x: Tensor, rows: Tensor, curvature: Tensor) -> Tensor:
    """Return -B^T H^-1 v with H of the curvature batch and B = -A^T A of the level's."""
    return rows.T @ rows @ torch.linalg.solve(curvature.T @ curvature + torch.eye(3), x)


@drawn(10)
@given(seed=seeds)
def test_the_hessian_is_of_the_curvature_batch_and_the_mixed_product_of_the_levels(seed: int) -> None:
    torch.manual_seed(seed)
    rows, curvature = torch.randn(5, 3), torch.randn(2, 3)
    problem = problem_of([curvature], rows)
    x = problem["x"].module.value.detach()
    assert distance(gradient_of(problem), expected(x, rows, curvature)) < 1e-10
    assert distance(gradient_of(problem), expected(x, rows, rows)) > 1e-3


def test_standalone_calls_draw_one_batch_after_the_other() -> None:
    rows, batches = torch.randn(5, 3), list(torch.randn(3, 2, 3))
    problem = problem_of(batches, rows)
    x = problem["x"].module.value.detach()
    for curvature in (*batches, batches[0]):
        assert distance(gradient_of(problem), expected(x, rows, curvature)) < 1e-10


class Watch(mlopt.Callback):
    """Note the outermost gradient of each step, and where the inner level was."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def on_step_end(self, run: Any) -> None:
        problem = run.problem
        self.seen.append((problem["shift"].module.value.grad.clone(), problem["x"].module.value.detach().clone()))


def test_solve_draws_one_batch_an_outer_step_and_leaves_training_its_order() -> None:
    rows, batches = torch.randn(5, 3), list(torch.randn(2, 2, 3))
    watch = Watch()
    problem = problem_of(batches, rows)
    mlopt.hypergradient(problem)  # from a stream of its own
    mlopt.solve(problem, steps=3, callbacks=[watch], seed=0, progress=False)
    for (gradient, x), curvature in zip(watch.seen, (*batches, batches[0]), strict=True):
        assert distance(gradient, expected(x, rows, curvature)) < 1e-10


def test_where_it_makes_no_sense_it_is_refused() -> None:
    with pytest.raises(mlopt.EstimatorError, match=r"curvature_data with Identity\(\), which takes no product"):
        problem_of([torch.ones(1, 3)], torch.ones(1, 3), mlopt.linear.Identity)
    rule = LinearSolve(solver=mlopt.linear.Dense(), curvature_data=[None])
    with pytest.raises(mlopt.EstimatorError, match=r"level 'y': curvature_data .* 'z' lies inside it"):
        mlopt.hypergradient(quadratic("nested", {"y": rule, "z": mlopt.Dense()}).problem)
