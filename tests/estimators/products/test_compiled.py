"""Compiled products, against the same ones evaluated eagerly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled_cases import BATCHES, INPUTS, decay, loss_of
from core_cases import distance, gradient_of
from torch import Tensor, nn

import mlopt
from mlopt.estimators import LinearSolve
from mlopt.estimators.products.checked import is_due


def problem_of(network: nn.Module, compile: bool, loss: Any = None, products: str = "forward") -> mlopt.Problem:
    """Return weights of samples over a network with dropout and batch norm."""

    def validation(weights: nn.Module, batch: Any, *, network: nn.Module) -> Tensor:
        return network[0](INPUTS).square().mean()

    rule = LinearSolve(solver=mlopt.linear.ConjugateGradient(iterations=4), products=products, compile=compile)
    return mlopt.Problem(
        mlopt.Level("weights", mlopt.variables(torch.rand(7)), validation),
        mlopt.Level("network", network, loss or loss_of, data=BATCHES, estimator=rule, regularizer=decay),
    )


@pytest.fixture
def inductor() -> None:
    """Skip the test if inductor cannot compile one line: without a C++ compiler, or for the kernels of this processor."""
    try:
        torch.compile(lambda x: x.tanh().sum())(torch.ones(37))
    except RuntimeError as error:
        pytest.skip(f"inductor does not compile here: {str(error).splitlines()[0]}")


@pytest.mark.usefixtures("inductor")
def test_compiled_products_are_those_of_eager_code() -> None:
    """With batches of other values and sizes, the same dropout masks, and buffers left alone."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 2))
    torch.manual_seed(1)
    compiled = problem_of(network, compile=True)
    torch.manual_seed(1)
    eager = problem_of(network, compile=False)
    buffers = [buffer.clone() for buffer in network.buffers()]
    seen = []
    for seed in range(len(BATCHES)):
        gradient, expected = gradient_of(compiled, seed=seed), gradient_of(eager, seed=seed)
        assert distance(gradient, expected) < 1e-12
        seen.append(expected)
    assert distance(seen[0], seen[1]) > 1e-2
    assert all(map(torch.equal, network.buffers(), buffers))
    assert set(compiled.workspace.compiled) == {("network", "loss"), ("network", "regularizer")}


@pytest.mark.usefixtures("inductor")
def test_recorded_products_are_those_of_eager_code() -> None:
    """With batches of other values, the same dropout masks, and buffers left alone."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 2))
    torch.manual_seed(1)
    compiled = problem_of(network, compile=True, products="autograd")
    torch.manual_seed(1)
    eager = problem_of(network, compile=False, products="autograd")
    buffers = [buffer.clone() for buffer in network.buffers()]
    seen = []
    for seed in range(3):
        batches = {"network": BATCHES[seed % 2]}
        gradient, expected = (gradient_of(problem, batches=batches, seed=seed) for problem in (compiled, eager))
        assert distance(gradient, expected) < 1e-12
        seen.append(expected)
    assert distance(seen[0], seen[1]) > 1e-2
    assert all(map(torch.equal, network.buffers(), buffers))
    assert set(compiled.workspace.compiled) == {("network", part, "autograd") for part in ("loss", "regularizer")}


def test_a_loss_that_cannot_be_compiled_is_named() -> None:
    def loss(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
        print("a side effect")
        return module(batch[0]).square().mean() * weights().sum()

    with pytest.raises(
        mlopt.EstimatorError, match=r"level 'network': torch.compile cannot compile its loss .* compile=False"
    ):
        mlopt.hypergradient(problem_of(nn.Sequential(nn.Linear(3, 2)), compile=True, loss=loss))


@pytest.mark.parametrize("products", ["finite_difference", "gauss_newton"])
def test_only_second_derivatives_are_compiled(products: str) -> None:
    with pytest.raises(mlopt.EstimatorError, match=f"compile=True with products='{products}'.*'autograd' or 'forward'"):
        LinearSolve(solver=mlopt.linear.Dense(), products=products, compile=True)


def broken_after(uses: int) -> Any:
    """Return a stand-in for torch.compile whose functions are right for a number of calls, and 26 times off afterwards."""

    def compile(function: Any, **options: Any) -> Any:
        calls = 0

        def compiled(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            return tuple((1.0 if calls <= uses else 26.0) * x for x in function(*arguments))

        return compiled

    return compile


@pytest.mark.parametrize("uses", [0, 6])
def test_a_wrong_compiled_product_is_reported_and_dropped(uses: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 2))
    monkeypatch.setattr(torch, "compile", broken_after(uses))
    torch.manual_seed(1)
    compiled = problem_of(network, compile=True)
    torch.manual_seed(1)
    eager = problem_of(network, compile=False)
    batches = {"network": BATCHES[0]}
    remarks: list[str] = []
    for seed in range(4):
        result = mlopt.hypergradient(compiled, batches, seed=seed)
        report, expected = result.reports["network"], gradient_of(eager, batches=batches, seed=seed)
        spoken = [remark for remark in report.remarks if "compiled product" in remark]
        remarks += spoken
        right = distance(result.gradient["value"], expected) < 1e-12
        assert report.doubtful or not spoken
        assert right or uses > 0
    assert len(remarks) == 2  # of the loss and of the regularizer
    assert "differed from the live one by 2500.0%" in remarks[0]
    assert set(compiled.workspace.compiled.values()) == {None}
    assert right


def test_compiled_products_are_compared_now_and_then() -> None:
    """At the first use of each shape, the tenth, the hundredth, and every thousandth."""
    term = type("Term", (), {"label": ("y", "loss"), "workspace": mlopt.problem.Workspace()})()
    for shapes in ("3", "4"):
        due = [use for use in range(1, 3001) if is_due(term, shapes)]
        assert due == [1, 10, 100, 1000, 2000, 3000]
