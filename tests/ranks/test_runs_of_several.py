"""Runs on several processes: files, signals, resumption on another number of processes, random numbers, a process that ends."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import process_cases
import pytest
import torch
from process_cases import destroyed, drawing, exchanged, interrupted, kept, outcome, resumed, stopped, timed
from processes import in_processes

import mlopt


def begin(folder: Path) -> dict[str, Any]:
    """Return what runs that end early leave, in this process."""
    return {
        "interrupted": outcome(lambda group: interrupted(group, folder / "two")),
        "resumed": outcome(lambda group: resumed(group, folder / "one")),
        "stopped": outcome(stopped),
        "drawing": outcome(drawing),
        "exchanged": outcome(exchanged),
        "timed": outcome(timed),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of one process that ended after three steps, and later with one of two."""
    folder = tmp_path_factory.mktemp("runs")
    cut_off = mlopt.Checkpoints(folder / "one", every=3)
    process_cases.run_of(process_cases.resumable(None), 3, checkpoint=cut_off)
    return folder


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    return in_processes(2, begin, folder, folder=folder)


def require_close(values: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert values.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.allclose(values[key], value, rtol=1e-12, atol=1e-14), key


def test_a_run_of_one_process_resumes_on_two(two: list[dict[str, Any]]) -> None:
    expected = process_cases.run_of(process_cases.resumable(None), 8)
    for own in two:
        require_close(own["resumed"], expected)


def test_a_signal_to_one_process_ends_both_and_one_process_resumes(two: list[dict[str, Any]], folder: Path) -> None:
    assert [own["interrupted"] for own in two] == [{"interrupted": 3}] * 2
    # Only the first process writes.
    assert sorted(path.name for path in (folder / "two").iterdir()) == ["history.csv", "step-00000003"]
    assert len((folder / "two" / "history.csv").read_text().splitlines()) == 4
    require_close(resumed(None, folder / "two"), process_cases.run_of(process_cases.resumable(None), 8))


def test_a_run_that_one_process_stops_ends_in_both(two: list[dict[str, Any]]) -> None:
    assert [len(own["stopped"]["step"]) for own in two] == [2, 2]


def test_time_that_is_over_in_one_process_is_over_in_both(two: list[dict[str, Any]]) -> None:
    assert [own["timed"] for own in two] == [{"steps": 0}] * 2


def test_masks_follow_the_seed_and_leave_the_common_generators_alone(two: list[dict[str, Any]]) -> None:
    (first, second) = (own["drawing"] for own in two)
    assert torch.equal(first["first"], first["again"])
    assert not torch.equal(first["first"], first["other"])
    for name in ("first", "state", "run"):
        assert torch.equal(first[name], second[name]), name


def test_a_vector_is_exchanged_once(two: list[dict[str, Any]]) -> None:
    """With 37 weights and a network of 19 variables in 4 tensors; each exchange has one more number, for failures."""
    weights, model, tensors = 37, 19, 4
    products = [model + 1] * 5
    # The loss, its partial derivatives, five products of conjugate gradients, the mixed product, and the gradient of the report.
    pullback = [*products, weights + 1, model + 1]
    assert two[0]["exchanged"]["hypergradient"] == [2, weights + model + 1, *pullback]
    # Signals; three steps inside with the loss, what is used and two logged numbers; a step outside with the loss and one.
    step = [3, *[1 + model + tensors + 2 + 1] * 3, 1 + weights + model + 1 + 1, *pullback]
    first, *run = two[0]["exchanged"]["run"]
    assert run == step * 2
    assert first == 3


def test_a_mean_of_separate_hypergradients_is_another_number() -> None:
    """So processes must share the linear solve: each Hessian on the rows of one process is another one."""
    options = {"count": 37, "steps": 1}
    whole = process_cases.of(process_cases.two_levels(mlopt.Dense(), None, **options))["value"]
    batch = process_cases.indexed(37)
    halves = []
    for rows in (slice(0, 18), slice(18, 37)):
        part = process_cases.two_levels(mlopt.Dense(), None, data=[tuple(t[rows] for t in batch)], **options)
        halves.append(len(range(37)[rows]) / 37 * process_cases.of(part)["value"])
    assert float((sum(halves) - whole).norm() / whole.norm()) > 0.05


def end_one(folder: Path) -> Any:
    """Return the error of a process whose other one ends in the third step."""

    class End(mlopt.Callback):
        def on_step_end(self, run: Any) -> None:
            if run.step == 2 and os.environ["RANK"] == "1":
                os._exit(1)

    begun = time.monotonic()
    error = outcome(lambda group: process_cases.run_of(process_cases.resumable(group), 8, callbacks=[End()]))
    return error, time.monotonic() - begun


def test_a_process_that_ends_takes_the_other_with_it(tmp_path: Path) -> None:
    ((kind, message), seconds), _ = in_processes(2, end_one, tmp_path, folder=tmp_path, ends=[1])
    assert kind == "ProcessError"
    assert message.startswith("process 0 of 2 could not exchange values with the others")
    assert seconds < 60


def test_no_group_outlives_its_end_because_of_a_problem(tmp_path: Path) -> None:
    # The threads of a group that lives until Python ends may abort the process.
    for own in in_processes(2, outcome, destroyed, folder=tmp_path):
        assert own["alive"] == []
        assert "the group of 2 processes that shares this problem was destroyed" in own["error"]


def test_a_group_that_the_user_keeps_holds_no_other(tmp_path: Path) -> None:
    assert in_processes(2, outcome, kept, folder=tmp_path) == [True, True]
