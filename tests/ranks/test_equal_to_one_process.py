"""Several processes evaluate and take steps as one process does on the whole batch."""

from __future__ import annotations

from typing import Any

import process_cases
import pytest
import torch
from process_cases import COUNTING, EQUAL, RAISING, Values
from processes import in_processes

#: Rounding over the step of differences; a history of nearly parallel directions amplifies it.
AMPLIFIED = ("history", "differences", "value function", "sama", "real steps")
#: Cases for four processes, of which one has no row.
UNEVEN = [name for name in EQUAL if name.startswith(("three rows", "nested conj", "mixture identity", "run: loaders"))]


def evaluate(names: list[str], *, raising: bool) -> dict[str, Any]:
    """Return the outcome of each case in this process."""
    outcomes = {name: process_cases.outcome(EQUAL[name]) for name in names}
    cases = {name: case for name, (case, _) in (RAISING | COUNTING).items()} if raising else {}
    return outcomes | {name: process_cases.outcome(case) for name, case in cases.items()}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The outcomes of all cases in two processes."""
    return in_processes(2, evaluate, list(EQUAL), raising=True, folder=tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The outcomes of some cases in four processes."""
    return in_processes(4, evaluate, UNEVEN, raising=False, folder=tmp_path_factory.mktemp("four"))


def require_equal(outcomes: list[Any], name: str) -> None:
    alone: Values = EQUAL[name](None)
    tolerance = 1e-9 if any(word in name for word in AMPLIFIED) else 1e-12
    for outcome in outcomes:
        assert isinstance(outcome[name], dict), outcome[name]
        assert outcome[name].keys() == alone.keys()
        for key, value in alone.items():
            both = torch.cat([outcome[name][key].reshape(-1), value.reshape(-1)])
            assert both.isfinite().any()
            gap = (outcome[name][key] - value).nan_to_num().norm() / value.nan_to_num().norm().clamp_min(1e-3)
            assert float(gap) <= tolerance, (key, float(gap))
    first, *others = (outcome[name] for outcome in outcomes)
    for other in others:  # bit for bit: all take the same decisions
        assert all(torch.equal(first[key].nan_to_num(), other[key].nan_to_num()) for key in first)


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_are_equal_to_one(two: list[Any], name: str) -> None:
    require_equal(two, name)


@pytest.mark.parametrize("name", UNEVEN)
def test_processes_without_rows_are_equal_to_one(four: list[Any], name: str) -> None:
    require_equal(four, name)


@pytest.mark.parametrize("name", RAISING)
def test_an_error_is_raised_in_every_process(two: list[Any], name: str) -> None:
    kind, part = RAISING[name][1]
    raised = [outcome[name] for outcome in two]
    assert all(isinstance(outcome, tuple) for outcome in raised), raised
    # In the process that failed, the error is its own.
    seen = [outcome for outcome in raised if outcome != ("KeyError", "'no such row'")]
    assert seen
    for outcome in seen:
        assert outcome[0] == kind, outcome
        assert part in outcome[1]


@pytest.mark.parametrize("name", COUNTING)
def test_another_count_in_one_process_is_refused_in_both(two: list[Any], name: str) -> None:
    (first, failed), (second, refused) = (outcome[name] for outcome in two)
    assert (first, second) == ("ProcessError", "ProblemError")
    assert "another process failed to evaluate the loss of level 'model'" in failed
    assert COUNTING[name][1] in refused
