"""The page on conditions and games: its code runs unchanged, and its statements hold."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mlopt

PAGE = Path(__file__).parents[2] / "docs" / "conditions.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """The names that the page's code defines."""
    names: dict[str, Any] = {"__name__": "page"}
    with contextlib.redirect_stdout(io.StringIO()):
        for block in BLOCKS:
            exec(compile(block, str(PAGE), "exec"), names)
    return names


def test_each_example_is_short() -> None:
    assert all(block.count("\n") < 40 for block in BLOCKS)


def test_the_layer_has_the_derivative_of_an_unrolled_one(names: dict[str, Any]) -> None:
    history = names["run"].history
    assert history.column("x/residual")[-1] < 1e-8
    assert history.column("u/loss")[-1] < history.column("u/loss")[0] / 3
    problem = names["equilibrium"]
    outer = problem["u"].module.value.detach().requires_grad_()
    x = torch.zeros(8, dtype=torch.float64)
    for _ in range(500):
        x = names["layer"](x, outer)
    problem["x"].module.value.data.copy_(x.detach())
    (expected,) = torch.autograd.grad((x - names["target"]).square().sum(), outer)
    gradient = mlopt.hypergradient(problem).gradient["value"]
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-12)


def test_the_market_reaches_its_equilibrium_and_the_tax_its_target(names: dict[str, Any]) -> None:
    problem = names["nash"]
    tax = problem["tax"].module.value.detach()
    torch.testing.assert_close(tax, torch.tensor(0.5), rtol=1e-4, atol=0.0)
    game = problem["market"].module
    torch.testing.assert_close(game["a"]().detach(), (1 - 2 * tax) / 3, rtol=0.0, atol=1e-3)
    torch.testing.assert_close(game["b"]().detach(), (1 + tax) / 3, rtol=1e-3, atol=0.0)


def test_its_leader_sells_more(names: dict[str, Any]) -> None:
    """The two players of the market as levels, with the tax at zero."""
    first, second = names["market"]().definition._players

    def level(player: mlopt.Level, start: float, **options: Any) -> mlopt.Level:
        return mlopt.Level(player.name, mlopt.variables(torch.tensor(start)), player.loss, **options)

    def outer(tax: Any, batch: Any, *, a: Any) -> Tensor:
        return a().square()

    problem = mlopt.Problem(
        mlopt.Level("tax", mlopt.variables(torch.zeros(())), outer),
        level(first, 0.5, estimator=mlopt.Dense()),
        level(second, 0.25, estimator=mlopt.Dense()),
    )
    assert float(mlopt.hypergradient(problem, level="a").gradient["value"]) == pytest.approx(0.0, abs=1e-6)
    assert float(mlopt.hypergradient(problem, level="b").gradient["value"]) == pytest.approx(0.0, abs=1e-6)
    assert float(mlopt.hypergradient(problem).gradient["value"]) == pytest.approx(2 * 0.5 * -1.0, abs=1e-6)


def test_the_value_function_fits_its_own_targets(names: dict[str, Any]) -> None:
    problem = names["values"]
    values, rewards = (problem[name].module.value.detach() for name in ("values", "rewards"))
    states, successors = names["states"], names["successors"]
    projected = torch.linalg.lstsq(states, states @ rewards + 0.9 * successors @ values).solution
    torch.testing.assert_close(values, projected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(values, torch.ones(3, dtype=torch.float64), rtol=0.0, atol=0.02)
