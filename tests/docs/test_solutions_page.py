"""The page on solutions: its code runs unchanged, and its derivatives are those of the closed form and of refits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression

import mlopt

PAGE = Path(__file__).parents[2] / "docs" / "solutions.md"


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """The names that the page's code defines."""
    names: dict[str, Any] = {"__name__": "page"}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert all(block.count("\n") < 40 for block in blocks)
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    return names


def test_the_layer_is_the_closed_form(names: dict[str, Any]) -> None:
    penalty = torch.zeros((), dtype=torch.float64, requires_grad=True)
    features, targets = names["network"](names["inputs"]), names["targets"]
    z = features[:20]
    weights = torch.linalg.solve(z.T @ z + penalty.exp() * torch.eye(3, dtype=torch.float64), z.T @ targets[:20])
    loss = (features[20:] @ weights - targets[20:]).square().mean()
    first = names["network"][0]
    for own, expected in zip(
        (first.weight.grad, names["penalty"].grad), torch.autograd.grad(loss, (first.weight, penalty)), strict=True
    ):
        torch.testing.assert_close(own, expected, rtol=1e-8, atol=1e-10)


def test_lbfgs_ends_at_the_solution_and_is_differentiated(names: dict[str, Any]) -> None:
    problem, report = names["problem"], names["by_lbfgs"].reports["model"]
    assert report.stationarity < 1e-6
    assert report.converged
    mlopt.check_hypergradient(problem, oracle="resolve", tolerance=1e-4)


def test_a_fit_of_scikit_learn_is_differentiated(names: dict[str, Any]) -> None:
    inputs, labels = names["inputs"].numpy(), names["labels"].numpy()

    def total(log_c: float) -> float:
        fit = LogisticRegression(C=float(torch.tensor(log_c).double().exp()), tol=1e-12, max_iter=10_000)
        return float(fit.fit(inputs, labels).coef_.sum())

    difference = (total(0.5 + 1e-3) - total(0.5 - 1e-3)) / 2e-3
    assert float(names["log_c"].grad) == pytest.approx(difference, rel=1e-3)
