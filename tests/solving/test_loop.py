"""Everything around the steps: evaluation, logs, the time limit, and invalid arguments of solve."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from callback_cases import callback
from hypothesis import given, settings
from hypothesis import strategies as st
from option_cases import F64, vector
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader

import mlopt
from mlopt import Level, Problem


def noisy() -> Problem:
    """Return a problem whose steps draw random numbers: dropout, and a shuffling loader."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(2, 4, dtype=F64), nn.Dropout(0.5), nn.Linear(4, 1, dtype=F64))

    def loss(own, batch):
        return own(batch).square().mean() + 0.1 * random.random() * own[0].weight.sum()

    loader = DataLoader(torch.randn(8, 2, dtype=F64), batch_size=4, shuffle=True)
    return Problem(Level("net", net, loss, data=loader, optimizer=partial(SGD, lr=0.1)))


def still(**arguments: Any) -> Problem:
    level = {"loss": lambda own, batch: own().square().sum(), "optimizer": partial(SGD, lr=0.1), **arguments}
    return Problem(Level("x", vector(1.0), **level))


class Rows(mlopt.Callback):
    """Records the steps of the rows that each call receives."""

    def __init__(self) -> None:
        self.calls: list[list[float]] = []
        self.evaluations: list[tuple[int, dict[str, float]]] = []

    def on_log(self, run, rows):
        assert [dict(row) for row in rows] == [run.history[int(row["step"]) - 1] for row in rows]
        self.calls.append([row["step"] for row in rows])

    def on_evaluate(self, run, metrics):
        self.evaluations.append((run.step, dict(metrics)))


@settings(max_examples=15, deadline=None)
@given(steps=st.integers(0, 9), every=st.integers(1, 5), shown=st.integers(1, 4), stop=st.integers(1, 12))
def test_each_row_is_passed_once_with_its_metrics(steps: int, every: int, shown: int, stop: int) -> None:
    ending = callback(on_step_end=lambda run: run.stop("enough") if run.step == stop else None)
    problem, rows = still(), Rows()

    def evaluate(given_problem: Problem) -> dict[str, Any]:
        assert given_problem is problem
        return {"x": problem["x"].module.value.sum().detach(), "twice": 2}

    options: dict[str, Any] = {"log_every": shown, "evaluate": evaluate, "evaluate_every": every, "progress": False}
    solution = mlopt.solve(problem, steps, callbacks=[rows, ending], **options)
    taken = min(steps, stop)
    assert solution.status == ("enough" if stop <= steps else "completed")
    full = taken // shown * shown
    last = [list(range(full + 1, taken + 1))] if taken > full else []
    assert rows.calls == [list(range(k + 1, k + 1 + shown)) for k in range(0, full, shown)] + last
    for row in solution.history:
        step = int(row["step"])
        # Each step multiplies x by 0.8.
        metrics = {"x": pytest.approx(0.8**step, rel=1e-12), "twice": 2.0}
        expected = {f"evaluation/{name}": value for name, value in metrics.items()} if step % every == 0 else {}
        assert {name: value for name, value in row.items() if name.startswith("evaluation/")} == expected
    assert [step for step, _ in rows.evaluations] == list(range(every, taken + 1, every))


def test_draws_of_an_evaluation_do_not_change_training() -> None:
    problem = noisy()
    mlopt.solve(problem, 5, seed=2, progress=False)
    expected = problem["net"].module.state_dict()
    again = noisy()
    numbers: list[float] = []

    def evaluate(given_problem: Problem) -> dict[str, float]:
        numbers.extend((torch.rand(()).item(), random.random(), float(np.random.rand())))
        list(given_problem["net"].data)  # type: ignore[arg-type]
        return {}

    mlopt.solve(again, 5, seed=2, evaluate=evaluate, progress=False)
    assert len(numbers) == 15
    for name, tensor in again["net"].module.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("returned", "sentence"),
    [
        (0.9, r"evaluate returned 0\.9; it must return a mapping of named numbers"),
        (None, r"evaluate returned None; it must"),
        (
            {"accuracy": "high"},
            r"evaluate returned \{'accuracy': 'high'\} \(could not convert.*it must return a mapping",
        ),
        ({"accuracy": None}, r"evaluate returned \{'accuracy': None\}"),
        ({"accuracy": torch.ones(2)}, r"evaluate returned \{'accuracy': tensor"),
    ],
)
def test_an_evaluation_that_does_not_return_numbers_is_refused(returned: object, sentence: str) -> None:
    with pytest.raises(mlopt.ProblemError, match=sentence):
        mlopt.solve(still(), 2, evaluate=lambda problem: returned, progress=False)  # type: ignore[arg-type, return-value]


def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Stop the clock; return a function that advances it."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def pass_by(seconds: float) -> None:
        now[0] += seconds

    return pass_by


class Slow(mlopt.Callback):
    """Makes every outer step take two seconds; records the final status of the run."""

    def __init__(self, pass_by: Callable[[float], None]) -> None:
        self.pass_by, self.status = pass_by, ""

    def on_step_begin(self, run):
        self.pass_by(2.0)

    def on_train_end(self, run):
        self.status = run.status


@pytest.mark.parametrize("limit", [5, 5.0, timedelta(seconds=5)])
def test_no_step_begins_after_the_time_limit(limit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(clock(monkeypatch))
    solution = mlopt.solve(still(), 10, callbacks=[slow], max_time=limit, progress=False)
    assert len(solution.history) == 3  # begun after 0, 2 and 4 seconds
    assert solution.status == slow.status == "max_time of 5 s reached"
    # A run that completes at its time limit counts as completed.
    solution = mlopt.solve(still(), 3, callbacks=[slow], max_time=limit, progress=False)
    assert solution.status == slow.status == "completed"


def test_a_run_that_reached_its_time_limit_can_be_resumed(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, problem = Slow(clock(monkeypatch)), noisy()
    arguments: dict[str, Any] = {"max_time": 5, "seed": 3, "progress": False, "callbacks": [slow]}
    lengths = []
    for _ in range(3):
        problem = noisy()
        solution = mlopt.solve(problem, 8, checkpoint=tmp_path, resume=True, **arguments)
        lengths.append(len(solution.history))
    assert lengths == [3, 6, 8]
    assert solution.status == "completed"
    expected = noisy()
    history = mlopt.solve(expected, 8, seed=3, progress=False).history
    assert list(solution.history) == list(history)
    for name, tensor in problem["net"].module.state_dict().items():
        assert torch.equal(tensor, expected["net"].module.state_dict()[name])


def test_the_time_limit_applies_to_the_warm_up_too(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pass_by = clock(monkeypatch)
    evaluations: list[int] = []

    def inner(own, batch, *, x):
        evaluations.append(1)
        pass_by(2.0)
        return (own() - x()).square().sum()

    def outer(own, batch, *, y):
        return y().square().sum() + own().square().sum()

    def problem() -> Problem:
        sgd = partial(SGD, lr=0.1)
        return Problem(
            Level("x", vector(1.0), outer, optimizer=sgd),
            Level("y", vector(1.0), inner, optimizer=sgd, warmup=5, estimator=mlopt.Identity()),
        )

    def run(limit: float, folder: str = "stopped") -> mlopt.Solution:
        evaluations.clear()
        return mlopt.solve(
            problem(), 1, checkpoint=tmp_path / folder, resume=True, max_time=limit, seed=0, progress=False
        )

    assert run(100, "whole").status == "completed"
    whole = len(evaluations)  # the warm-up, the inner step, its pullback, and the checks of a first pullback
    stopped = run(5)
    assert len(evaluations) == 3
    assert len(stopped.history) == 0
    assert run(100).status == "completed"
    assert len(evaluations) == whole - 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"problem": 3}, r"solve: problem=3; it must be an mlopt\.Problem"),
        ({"steps": -1}, r"solve: steps=-1; it must be a whole number >= 0"),
        ({"steps": 1.5}, r"solve: steps=1\.5"),
        ({"steps": True}, r"solve: steps=True"),
        ({"callbacks": Rows()}, r"solve: callbacks=<.*Rows.*; it must be a sequence of mlopt\.Callback"),
        ({"callbacks": [print]}, r"solve: callbacks=\[<built-in function print>\]"),
        ({"callbacks": [Rows]}, r"solve: callbacks=\[<class"),
        ({"checkpoint": 3}, r"solve: checkpoint=3; it must be a folder"),
        ({"resume": "yes"}, r"solve: resume='yes'; it must be True or False"),
        ({"resume": True}, r"solve: resume=True without checkpoint"),
        ({"seed": 0.5}, r"solve: seed=0\.5; it must be a whole number, or None"),
        ({"seed": True}, r"solve: seed=True"),
        ({"lookahead": 1}, r"solve: lookahead=1; it must be True or False"),
        ({"evaluate": {"a": 1}}, r"solve: evaluate=\{'a': 1\}; it must be a function"),
        ({"evaluate_every": 0}, r"solve: evaluate_every=0; it must be a whole number >= 1"),
        ({"log_every": 0}, r"solve: log_every=0; it must be a whole number >= 1"),
        ({"max_time": 0}, r"solve: max_time=0; it must be a number of seconds > 0"),
        ({"max_time": float("nan")}, r"solve: max_time=nan"),
        ({"max_time": "1h"}, r"solve: max_time='1h'"),
        ({"max_time": True}, r"solve: max_time=True"),
        ({"max_time": timedelta(0)}, r"solve: max_time=datetime\.timedelta\(0\)"),
        ({"on_nonfinite": "ignore"}, r"solve: on_nonfinite='ignore'; it must be 'raise', 'skip' or 'rollback'"),
        ({"nonfinite_limit": 0}, r"solve: nonfinite_limit=0"),
        ({"progress": None}, r"solve: progress=None; it must be True or False"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_invalid_argument_of_solve_is_named(arguments: dict[str, Any], sentence: str) -> None:
    problem = still()
    before = torch.get_rng_state()
    with pytest.raises(mlopt.ArgumentError, match=sentence):
        mlopt.solve(**{"problem": problem, "steps": 1, **arguments})
    assert torch.equal(before, torch.get_rng_state())
    assert problem["x"].module.value.item() == 1.0
