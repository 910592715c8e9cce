"""The references of the benchmark, computed without mlopt, match its dense solve and closed forms."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
from core_cases import distance

import mlopt
from benchmarks.hypergrad import cases, data, exact, graphs
from benchmarks.hypergrad.adapters import mlopt as ours
from benchmarks.hypergrad.networks import SampleWeights, mlp

TINY = cases.Recipe(
    lambda: (mlp(6, 4, 3), SampleWeights(20)),
    partial(data.clusters, 6, 20, 3),
    partial(cases.cleaning_loss, ridge=0.3),
    cases.validation_loss,
    torch.float64,
    travel=5,
    pretraining=5,
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """Register a tiny case; return its name."""
    monkeypatch.setitem(cases.RECIPES, "tiny", TINY)
    return "tiny"


def hypergradient(case: cases.Case, estimator: mlopt.Estimator) -> torch.Tensor:
    return cases.flat(list(mlopt.hypergradient(ours.problem(case, estimator)).gradient.values()))


def test_the_reference_matches_the_dense_solve_of_mlopt(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = cases.make(tiny)
    monkeypatch.setattr(exact, "DENSE_LIMIT", 0)
    iterated = cases.make(tiny)
    for case in (dense, iterated):
        assert case.exact is not None
        assert distance(case.exact, hypergradient(case, mlopt.Dense())) < 1e-8
        assert case.identity is not None
        assert distance(case.identity, hypergradient(case, mlopt.Identity())) < 1e-12


@pytest.mark.parametrize("condition", [10, 1000])
def test_the_reference_on_a_quadratic_matches_its_closed_form(condition: int) -> None:
    case = cases.make(f"quadratic, condition {condition}")
    a, b, c, u = case.data["A"], case.data["B"], case.data["c"], case.u[0].detach()
    x = torch.linalg.solve(a, b @ u)
    assert case.exact is not None
    assert distance(case.exact, u + b.T @ torch.linalg.solve(a, x - c)) < 1e-10


def test_a_saved_case_is_loaded_unchanged(tiny: str, tmp_path: Path) -> None:
    made = cases.make(tiny, tmp_path / "case.pt")
    read = cases.load(tmp_path / "case.pt")
    assert read.f().item() == made.f().item()
    assert read.F().item() == made.F().item()
    assert read.step_size == made.step_size
    assert torch.equal(exact.hypergradient(read)[0], made.exact)


def test_functions_of_lists_match_the_losses_of_the_modules(tiny: str) -> None:
    case = cases.make(tiny)
    x = [2 * variable.detach() for variable in case.x]
    with torch.no_grad():
        expected = float(case.f_of(x, case.u)), float(case.F_of(x, case.u))
        for variable, value in zip(case.x, x, strict=True):
            variable.copy_(value)
        # The function and the module may use different kernels.
        assert (float(case.f()), float(case.F())) == pytest.approx(expected, rel=1e-12)


def test_an_indefinite_hessian_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = partial(cases.cleaning_loss, ridge=-5.0)
    monkeypatch.setitem(cases.RECIPES, "indefinite", dataclasses.replace(TINY, inner_loss=loss, travel=0))
    monkeypatch.setattr(exact, "DENSE_LIMIT", 0)
    with pytest.raises(ArithmeticError, match="positive definite"):
        cases.make("indefinite")


@pytest.mark.parametrize("shape", ["chain 2", "chain 3", "ladder 1", "ladder 3"])
def test_the_reference_on_a_graph_matches_the_dense_solve_of_mlopt(shape: str) -> None:
    graph = graphs.Graph(graphs.shape(shape), 3)
    assert distance(ours.GRAPHS["Dense"](graph, 0)(), graph.exact()) < 1e-10


@pytest.mark.parametrize("shape", ["chain 3", "ladder 2"])
def test_the_levels_of_a_graph_are_at_their_solutions(shape: str) -> None:
    graph = graphs.Graph(graphs.shape(shape), 3)
    for name, module in graph.modules.items():
        if name != "outer":
            loss = graph.loss(name, lambda other: graph.modules[other]())
            slope = torch.autograd.grad(loss, list(module.parameters()))[0]
            assert slope.norm() < 1e-12
