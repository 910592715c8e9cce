"""A warning of an outermost level that cannot move, from the first steps of a run."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

import mlopt


def outer_loss(u: nn.Module, batch: Any, *, y: nn.Module) -> Tensor:
    return y().square().sum()


def zero(y: nn.Module, u: nn.Module) -> Tensor:
    return (y() - 1 + 0 * u()).square().sum()


def linear(y: nn.Module, u: nn.Module) -> Tensor:
    return (y() - u()).square().sum()


def remarks(form: Any, *, steps: int = 4, lr: float = 0.1, estimator: Any = None, **options: Any) -> list[str]:
    step = partial(SGD, lr=0.1)
    problem = mlopt.Problem(
        mlopt.Level("u", mlopt.variables(torch.ones(2)), outer_loss, optimizer=partial(SGD, lr=lr), **options),
        mlopt.Level(
            "y",
            mlopt.variables(torch.full((2,), 0.5)),
            lambda y, batch, *, u: form(y, u),
            optimizer=step,
            estimator=estimator or mlopt.Dense(),
        ),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mlopt.solve(problem, steps=steps, progress=False)
    return [str(warning.message) for warning in caught if warning.category is mlopt.TrustWarning]


def test_hypergradients_that_are_all_zero_are_reported_once() -> None:
    (sentence,) = remarks(zero, steps=10)
    assert sentence.startswith("the hypergradient of level 'u' was exactly zero in the first 3 steps")


def test_a_scale_of_zero_is_named() -> None:
    (sentence,) = remarks(linear, estimator=mlopt.Identity(scale=0.0))
    assert "leaves the response of a level out (scale=0)" in sentence


def test_a_learning_rate_of_zero_is_reported_once() -> None:
    (sentence,) = remarks(linear, steps=10, lr=0.0)
    assert sentence.startswith("level 'u' had a learning rate of 0 in the first 3 steps")


@pytest.mark.parametrize(
    "case",
    [
        {"form": linear},
        {"form": linear, "steps": 2, "lr": 0.0},
        {"form": zero, "steps": 2},
        {"form": linear, "scheduler": lambda own: LambdaLR(own, lambda step: max(0, step - 4) / 10)},
    ],
    ids=["ordinary", "two steps at lr=0", "two zeros", "a warm-up of the learning rate"],
)
def test_it_is_silent(case: dict[str, Any]) -> None:
    assert remarks(**case) == []


def test_one_gradient_that_is_not_zero_is_enough() -> None:
    count = iter(range(100))

    def third(y: nn.Module, u: nn.Module) -> Tensor:
        return linear(y, u) if third.on else zero(y, u)  # type: ignore[attr-defined]

    class Switch(mlopt.Callback):
        def on_step_begin(self, run: Any) -> None:
            third.on = next(count) == 2  # type: ignore[attr-defined]

    problem = mlopt.Problem(
        mlopt.Level("u", mlopt.variables(torch.ones(2)), outer_loss, optimizer=partial(SGD, lr=0.1)),
        mlopt.Level(
            "y",
            mlopt.variables(torch.full((2,), 0.5)),
            lambda y, batch, *, u: third(y, u),
            optimizer=partial(SGD, lr=0.1),
            estimator=mlopt.Dense(),
        ),
    )
    mlopt.solve(problem, steps=4, progress=False, callbacks=[Switch()])
