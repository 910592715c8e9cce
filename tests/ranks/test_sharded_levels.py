"""Levels that `fully_shard` has sharded: equal to one process that holds them whole, or refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import sharded_cases
import torch
from process_cases import outcome
from processes import in_processes
from sharded_cases import EQUAL, REFUSED

#: Cases for three processes, of which one has no row, and some have no part of a tensor.
UNEVEN = ["conjugate gradient", "two rows", "single tensor"]


def evaluate(names: list[str], sharding: str, folder: Path | None = None) -> dict[str, Any]:
    """Return the outcome of each case in this process."""
    warnings.simplefilter("ignore")
    shard = getattr(sharded_cases, sharding)
    sharded_cases.guard_numbers()
    outcomes = {name: outcome(lambda _, name=name: EQUAL[name](shard)) for name in names}
    if folder is None:
        return outcomes
    refused = {name: outcome(lambda _, case=case: case(shard)) for name, (case, _) in REFUSED.items()}
    return outcomes | refused | {"saved": outcome(lambda _: sharded_cases.resumed(shard, folder / "run", 2))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    """The outcomes of all cases in two processes, in parts."""
    return in_processes(2, evaluate, list(EQUAL), "parts", folder, folder=folder)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The outcomes of some cases in three processes, in one unit."""
    return in_processes(3, evaluate, UNEVEN, "root", folder=tmp_path_factory.mktemp("three"))


def require_equal(outcomes: list[Any], name: str, expected: dict[str, torch.Tensor]) -> None:
    for own in outcomes:
        assert isinstance(own[name], dict), own[name]
        assert own[name].keys() == expected.keys()
        for key, value in expected.items():
            gap = (own[name][key] - value).nan_to_num().norm() / value.nan_to_num().norm().clamp_min(1e-3)
            assert float(gap) <= 1e-10, (key, float(gap))


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_are_equal_to_one(two: list[Any], name: str) -> None:
    require_equal(two, name, EQUAL[name](sharded_cases.alone))


@pytest.mark.parametrize("name", UNEVEN)
def test_three_processes_are_equal_to_one(three: list[Any], name: str) -> None:
    require_equal(three, name, EQUAL[name](sharded_cases.alone))


def test_one_process_resumes_a_run_of_two(two: list[Any], folder: Path, tmp_path: Path) -> None:
    assert isinstance(two[0]["saved"], dict), two[0]["saved"]
    alone = sharded_cases.alone
    expected = sharded_cases.resumed(alone, tmp_path, 4)
    require_equal([{"run": sharded_cases.resumed(alone, folder / "run", 4)}], "run", expected)


def resume(folder: Path, steps: int) -> Any:
    """Return the end of a run from the checkpoints in the folder, or its error, in this process."""
    warnings.simplefilter("ignore")
    return outcome(lambda _: sharded_cases.resumed(sharded_cases.parts, folder, steps))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (3, 1)])
def test_a_run_resumes_on_another_number_of_processes(before: int, after: int, tmp_path: Path) -> None:
    run, first, second = (tmp_path / name for name in ("run", "first", "second"))
    first.mkdir()
    second.mkdir()
    for own in in_processes(before, resume, run, 2, folder=first):
        assert isinstance(own, dict), own
    assert [step.name for step in run.iterdir()] == ["step-00000002"]
    alone = sharded_cases.alone
    ends = in_processes(after, resume, run, 4, folder=second) if after > 1 else [sharded_cases.resumed(alone, run, 4)]
    require_equal([{"run": own} for own in ends], "run", sharded_cases.resumed(alone, tmp_path / "uninterrupted", 4))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_with_a_remedy(two: list[Any], name: str) -> None:
    for own in two:
        kind, message = own[name]
        assert kind == "ProblemError", message
        assert REFUSED[name][1] in message, message
