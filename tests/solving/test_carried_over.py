"""Resumed runs keep flags, states of callbacks, versions and frozen parameters."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_cases import callback
from option_cases import around_means, solve
from states import assert_same_state
from torch import nn
from torch.optim import SGD, Adam

import mlopt
from mlopt import Level, Problem, variables
from mlopt.solving import serialization


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.drop = nn.Linear(3, 3), nn.Linear(3, 3), nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.drop(self.a(x)))


INPUTS = torch.linspace(-1, 1, 24).reshape(8, 3)


def one_level(module: nn.Module | None = None, **options: Any) -> Problem:
    def loss(own: Any, batch: Any) -> torch.Tensor:
        return (own(INPUTS) - 1).square().mean()

    return Problem(Level("x", module or Two(), loss, **{"optimizer": partial(Adam, lr=0.1), **options}))


def assert_split_run_equals_whole(tmp_path: Path, cut: int, steps: int, build: Any, **options: Any) -> None:
    """Compare the end of an uninterrupted run with that of a run in two parts, each with its own callbacks."""
    make = options.pop("callbacks", list)
    solve(build(), steps, tmp_path / "whole", callbacks=make(), **options)
    solve(build(), cut, tmp_path / "cut", callbacks=make(), **options)
    solve(build(), steps, tmp_path / "cut", resume=True, callbacks=make(), **options)
    whole, cut_ = (serialization.read(tmp_path / name / f"step-{steps:08d}") for name in ("whole", "cut"))
    assert_same_state(cut_, whole)


class Freeze(mlopt.Callback):
    """Freezes a part at the third step, and sets another to eval mode."""

    def on_step_begin(self, run: Any) -> None:
        if run.step == 2:
            run.problem["x"].module.a.requires_grad_(False)
            run.problem["x"].module.drop.eval()


def test_parts_frozen_by_a_callback_stay_frozen_after_a_resume(tmp_path: Path) -> None:
    problem = one_level()
    seen: list[torch.Tensor] = []
    watch = callback(on_step_end=lambda run: seen.append(problem["x"].module.a.bias.detach().clone()))
    solve(problem, 6, callbacks=[Freeze(), watch])
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[5])
    assert_split_run_equals_whole(tmp_path, 4, 6, one_level, callbacks=lambda: [Freeze()])


def test_other_frozen_layers_make_another_problem(tmp_path: Path) -> None:
    def frozen(part: str) -> Problem:
        module = Two()
        getattr(module, part).requires_grad_(False)
        return one_level(module)

    solve(frozen("a"), 2, tmp_path)
    with pytest.raises(
        mlopt.CheckpointError, match=r"'a.weight' is \(3, 3\) of torch.float32, frozen in the checkpoint"
    ):
        solve(frozen("b"), 3, tmp_path, resume=True)


def test_a_changed_learning_rate_is_reported_and_ignored(tmp_path: Path) -> None:
    solve(one_level(), 2, tmp_path)
    problem = one_level(optimizer=partial(Adam, lr=5.0))
    with pytest.warns(
        mlopt.CheckpointWarning, match="the optimizer keeps the hyperparameters of the checkpoint.*'lr': 0.1"
    ):
        solve(problem, 3, tmp_path, resume=True)
    assert problem["x"].module.a.weight.abs().max() < 2


class Counts(mlopt.Callback):
    """A callback whose state is a number, or empty."""

    def __init__(self, number: int | None) -> None:
        self.number = number
        self.got: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {} if self.number is None else {"number": self.number}

    def load_state_dict(self, state: Any) -> None:
        self.got = state["number"]


def test_callbacks_of_the_same_class_restore_their_own_state(tmp_path: Path) -> None:
    solve(one_level(), 1, tmp_path, callbacks=[Counts(None), Counts(5)])
    first, second = Counts(None), Counts(6)
    solve(one_level(), 2, tmp_path, resume=True, callbacks=[first, second])
    assert (first.got, second.got) == (None, 5)


def test_early_stopping_ignores_the_state_of_another_metric(tmp_path: Path) -> None:
    solve(one_level(), 2, tmp_path, callbacks=[mlopt.EarlyStopping("x/loss", patience=9)], log_every=1)
    with pytest.warns(
        UserWarning, match="'step' starts without a best value, because the checkpoint has that of 'x/loss'"
    ):
        solve(one_level(), 3, tmp_path, resume=True, callbacks=[mlopt.EarlyStopping("step", patience=9)], log_every=1)


def test_draws_of_callbacks_at_logs_and_saves_do_not_change_training(tmp_path: Path) -> None:
    def drawing() -> list[mlopt.Callback]:
        return [callback(on_save=lambda run, folder: torch.rand(3), on_log=lambda run, rows: torch.rand(5))]

    assert_split_run_equals_whole(tmp_path, 3, 6, one_level, callbacks=drawing, log_every=4)


def test_early_stopping_ends_a_resumed_run_at_the_same_step(tmp_path: Path) -> None:
    def stopping() -> mlopt.EarlyStopping:
        return mlopt.EarlyStopping("step", patience=2)  # the step only grows

    def terminate(run: Any) -> None:
        if run.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    expected = solve(one_level(), 30, callbacks=[stopping()])
    with pytest.raises(mlopt.Interrupted):
        solve(one_level(), 30, tmp_path, callbacks=[stopping(), callback(on_step_end=terminate)])
    solution = solve(one_level(), 30, tmp_path, resume=True, callbacks=[stopping()])
    assert (len(solution.history), solution.status) == (len(expected.history), expected.status) == (10, expected.status)


def test_an_unsaveable_state_is_an_error_at_the_first_save(tmp_path: Path) -> None:
    class Odd(mlopt.Callback):
        steps = 0

        def on_step_end(self, run: Any) -> None:
            self.steps += 1

        def state_dict(self) -> dict[str, Any]:
            return {"odd": object()}

    odd = Odd()
    with pytest.raises(mlopt.CheckpointError, match="odd"):
        solve(one_level(), 9, tmp_path, callbacks=[odd])
    assert odd.steps == 1


class Versioned(nn.Linear):
    """A layer that checks the version of the state that it loads, and has a count as extra state."""

    _version = 2

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.count = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return super().forward(x)

    def get_extra_state(self) -> int:
        return self.count

    def set_extra_state(self, state: int) -> None:
        self.count = state

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *more: Any) -> None:
        assert metadata["version"] == 2
        super()._load_from_state_dict(state, prefix, metadata, *more)


def test_versions_and_extra_state_of_modules_are_restored(tmp_path: Path) -> None:
    def build() -> Problem:
        torch.manual_seed(2)
        return one_level(Versioned())

    assert_split_run_equals_whole(tmp_path, 2, 4, build)
    resumed = build()
    solve(resumed, 4, tmp_path / "whole", resume=True)
    assert resumed["x"].module.count == 4


def test_a_buffer_that_a_run_fills_is_restored(tmp_path: Path) -> None:
    assert_split_run_equals_whole(tmp_path, 1, 3, lambda: around_means([[1.0, 2.0], [5.0, -1.0], [0.0, 3.0]]))


def test_a_rollback_restores_extra_state() -> None:
    problem = one_level(Versioned(), optimizer=partial(SGD, lr=1e30))
    solve(problem, 4, on_nonfinite="rollback")
    assert problem["x"].module.count < 4


def test_a_batch_norm_shared_by_two_levels_counts_the_steps_of_both() -> None:
    norm = nn.BatchNorm1d(3, affine=False)

    def loss(own: Any, other: Any) -> torch.Tensor:
        return (own[0](own[1](INPUTS)) - other[0](INPUTS)).square().mean()

    outer, inner = (nn.ModuleList([nn.Linear(3, 1), norm]) for _ in range(2))
    sgd = partial(SGD, lr=0.01)
    problem = Problem(
        Level("top", outer, lambda own, batch, *, net: loss(own, net), optimizer=sgd),
        Level("net", inner, lambda own, batch, *, top: loss(own, top), optimizer=sgd, estimator=mlopt.Identity()),
    )
    solve(problem, 5)
    assert norm.num_batches_tracked.item() == 10


def test_a_value_logged_for_only_some_batches_is_refused() -> None:
    def build(sometimes: int) -> Problem:
        calls: list[int] = []

        def loss(own: Any, batch: Any) -> dict[str, torch.Tensor]:
            calls.append(1)
            more = {"odd": own().sum()} if len(calls) == sometimes else {}
            return {"loss": own().square().sum(), **more}

        return Problem(Level("x", variables(torch.ones(2)), loss, optimizer=partial(SGD, lr=0.1), accumulate=2))

    for sometimes in (1, 2):
        with pytest.raises(mlopt.ProblemError, match="'x/odd' is logged for"):
            solve(build(sometimes), 1)
