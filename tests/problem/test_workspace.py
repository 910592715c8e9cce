"""A workspace keeps the caches and the standalone calls of a problem; check and diagnose use one of their own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from core_cases import contents, flat
from torch import Tensor, nn
from torch.utils.data import DataLoader

import mlopt
from mlopt.hypergradient import standalone
from mlopt.problem import Workspace
from mlopt.testing import same


def inner(network: nn.Module, batch: Tensor, *, weights: nn.Module) -> mlopt.Mixture:
    dropped = nn.functional.dropout(batch, 0.5)
    return mlopt.Mixture([network(dropped).square().mean(), (network(dropped) - 1).square().mean()], weights="weights")


def outer(weights: nn.Module, batch: Tensor, *, network: nn.Module) -> Tensor:
    return (network(batch) - 2).square().mean()


def build() -> mlopt.Problem:
    """Return a problem with shuffled data, curvature data, a mixture and forward products, to fill a workspace."""
    torch.manual_seed(0)
    data = torch.randn(12, 3)
    loader = partial(DataLoader, data, batch_size=4, shuffle=True)
    rule = mlopt.ConjugateGradient(iterations=50, damping=1.0, products="forward", curvature_data=loader())
    return mlopt.Problem(
        mlopt.Level("weights", mlopt.variables(torch.tensor([0.4, 0.6])), outer, data=loader()),
        mlopt.Level("network", nn.Linear(3, 1), inner, data=loader(), estimator=rule),
    )


def drawn(problem: mlopt.Problem) -> Tensor:
    return flat(mlopt.hypergradient(problem).gradient)


@pytest.mark.parametrize(
    "examine",
    [
        partial(mlopt.check_hypergradient, tolerance=1e9),
        partial(mlopt.check_hypergradient, oracle="resolve", tolerance=1e9, directions=1),
        mlopt.diagnose,
    ],
    ids=["dense", "resolve", "diagnose"],
)
@pytest.mark.parametrize("calls", [0, 1])
def test_check_and_diagnose_do_not_change_the_workspace(examine: Callable[[mlopt.Problem], Any], calls: int) -> None:
    problem, undisturbed = build(), build()
    for _ in range(calls):
        assert torch.equal(drawn(problem), drawn(undisturbed))
    before = contents(problem.workspace)
    examine(problem)
    assert same(contents(problem.workspace), before)
    assert torch.equal(drawn(problem), drawn(undisturbed))


def test_a_fresh_workspace_begins_with_the_first_batch_and_draw() -> None:
    problem = build()
    first, second = drawn(problem), drawn(problem)
    assert not torch.equal(first, second)
    assert torch.equal(flat(standalone(problem, None, None, None, Workspace()).gradient), first)


@pytest.mark.parametrize("loads", [1, 2], ids=["used", "saved again before it is used"])
def test_a_loaded_workspace_continues_the_draws(loads: int) -> None:
    problem, resumed = build(), build()
    drawn(problem)
    state = problem.workspace.state_dict()
    for _ in range(loads):
        drawn(resumed)
        resumed.workspace.load_state_dict(state)
        state = resumed.workspace.state_dict()
    assert torch.equal(drawn(resumed), drawn(problem))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda workspace: pickle.loads(pickle.dumps(workspace))])
def test_a_copy_continues_the_draws_without_the_caches(copied: Callable[[Workspace], Workspace]) -> None:
    problem = build()
    drawn(problem)
    # A compiled product holds the modules of the problem that it was compiled for, with their train or eval mode.
    problem.workspace.compiled["network", "loss"] = drawn
    other = build()
    other.workspace = copied(problem.workspace)
    assert not other.workspace.compiled
    assert torch.equal(drawn(other), drawn(problem))


def test_a_used_problem_can_be_copied() -> None:
    problem = build()
    drawn(problem)
    assert torch.equal(drawn(copy.deepcopy(problem)), drawn(problem))
