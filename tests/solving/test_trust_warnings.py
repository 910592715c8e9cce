"""Warnings of `solve`: each kind of remark at the first step that has it, and a count at the end."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mlopt


def saddle(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
    first, second = module()
    return (first * first - second * second) / 2 + (module() * x()).sum()


def pulled(module: nn.Module, batch: None, *, y: nn.Module) -> Tensor:
    return (y() * torch.tensor([1.0, 2.0])).sum()


def saddle_problem(estimator: mlopt.Estimator) -> mlopt.Problem:
    still = partial(torch.optim.SGD, lr=1e-30)
    return mlopt.Problem(
        mlopt.Level("x", mlopt.variables(torch.ones(2)), pulled, optimizer=still),
        mlopt.Level("y", mlopt.variables(torch.ones(2)), saddle, optimizer=still, estimator=estimator),
    )


class LastStep(mlopt.Callback):
    """The number of outer steps that have begun."""

    count = 0

    def on_step_begin(self, run: Any) -> None:
        self.count += 1


def test_a_run_warns_of_an_untrustworthy_solve_at_once_and_counts_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, warned = LastStep(), []
    monkeypatch.setattr(warnings, "warn", lambda message, *_, **__: warned.append((steps.count, message)))
    mlopt.solve(saddle_problem(mlopt.ConjugateGradient()), steps=3, progress=False, callbacks=[steps])
    assert [step for step, _ in warned] == [1, 3]
    assert warned[0][1].startswith("level 'y': negative curvature -")
    assert warned[1][1].startswith("level 'y', doubtful in 3 steps, most recently: negative curvature")


def test_numbers_do_not_make_a_remark_a_new_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    remarks = ["negative curvature -1.5e-03 at iteration 2", "negative curvature -inf at iteration 10", "singular"]

    class Doubting(mlopt.Estimator):
        def linearize(self, point: Any, level: str) -> Any:
            rule = mlopt.Identity().linearize(point, level)
            rule.report.remarks = (next(following),)
            return rule

    following, warned = iter([*remarks, remarks[0]]), []
    monkeypatch.setattr(warnings, "warn", lambda message, *_, **__: warned.append(message))
    mlopt.solve(saddle_problem(Doubting()), steps=4, progress=False)
    assert [next(r for r in remarks if r in message) for message in warned] == [remarks[0], remarks[2], remarks[0]]
    assert "doubtful in 4 steps" in warned[-1]
