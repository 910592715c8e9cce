"""What else a run carries over, or must not: flags, states of callbacks, versions, gradients of what is frozen."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
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


def solve(problem: Problem, steps: int, folder: Path | None = None, **options: Any) -> mlopt.Solution:
    saving = {} if folder is None else {"checkpoint": mlopt.Checkpoints(folder, every=1)}
    return mlopt.solve(problem, steps, **{"seed": 0, "progress": False, **saving, **options})


def split_is_whole(tmp_path: Path, cut: int, steps: int, build: Any, **options: Any) -> None:
    """Run in one go and in two, each with callbacks of its own, and hold the ends against each other."""
    make = options.pop("callbacks", list)
    solve(build(), steps, tmp_path / "whole", callbacks=make(), **options)
    solve(build(), cut, tmp_path / "cut", callbacks=make(), **options)
    solve(build(), steps, tmp_path / "cut", resume=True, callbacks=make(), **options)
    whole, cut_ = (serialization.read(tmp_path / name / f"step-{steps:08d}") for name in ("whole", "cut"))
    assert_same_state(cut_, whole)


class Freeze(mlopt.Callback):
    """Freezes a part at the third step, and lets another out of training."""

    def on_step_begin(self, run: Any) -> None:
        if run.step == 2:
            run.problem["x"].module.a.requires_grad_(False)
            run.problem["x"].module.drop.eval()


def test_what_a_callback_freezes_stays_and_stays_so_after_a_resume(tmp_path: Path) -> None:
    problem = one_level()
    seen = []

    class Watch(mlopt.Callback):
        def on_step_end(self, run: Any) -> None:
            seen.append(problem["x"].module.a.bias.detach().clone())

    solve(problem, 6, callbacks=[Freeze(), Watch()])
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[5])
    split_is_whole(tmp_path, 4, 6, one_level, callbacks=lambda: [Freeze()])


def test_other_layers_frozen_are_another_problem(tmp_path: Path) -> None:
    def frozen(part: str) -> Problem:
        module = Two()
        getattr(module, part).requires_grad_(False)
        return one_level(module)

    solve(frozen("a"), 2, tmp_path)
    with pytest.raises(
        mlopt.CheckpointError, match=r"'a.weight' is \(3, 3\) of torch.float32, frozen in the checkpoint"
    ):
        solve(frozen("b"), 3, tmp_path, resume=True)


def test_a_learning_rate_that_is_given_anew_is_told_and_does_not_count(tmp_path: Path) -> None:
    solve(one_level(), 2, tmp_path)
    problem = one_level(optimizer=partial(Adam, lr=5.0))
    with pytest.warns(
        mlopt.CheckpointWarning, match="the optimizer keeps the hyperparameters of the checkpoint.*'lr': 0.1"
    ):
        solve(problem, 3, tmp_path, resume=True)
    assert problem["x"].module.a.weight.abs().max() < 2


class Counts(mlopt.Callback):
    """Carries a number, or nothing."""

    def __init__(self, number: int | None) -> None:
        self.number = number
        self.got: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {} if self.number is None else {"number": self.number}

    def load_state_dict(self, state: Any) -> None:
        self.got = state["number"]


def test_callbacks_of_one_kind_get_their_own_state_back(tmp_path: Path) -> None:
    solve(one_level(), 1, tmp_path, callbacks=[Counts(None), Counts(5)])
    first, second = Counts(None), Counts(6)
    solve(one_level(), 2, tmp_path, resume=True, callbacks=[first, second])
    assert (first.got, second.got) == (None, 5)


def test_early_stopping_takes_no_other_metrics_state(tmp_path: Path) -> None:
    solve(one_level(), 2, tmp_path, callbacks=[mlopt.EarlyStopping("x/loss", patience=9)], log_every=1)
    with pytest.warns(
        UserWarning, match="'step' starts without a best value, because the checkpoint has that of 'x/loss'"
    ):
        solve(one_level(), 3, tmp_path, resume=True, callbacks=[mlopt.EarlyStopping("step", patience=9)], log_every=1)


class Draws(mlopt.Callback):
    def on_save(self, run: Any, folder: Path) -> None:
        torch.rand(3)

    def on_log(self, run: Any, rows: Any) -> None:
        torch.rand(5)


def test_what_callbacks_draw_at_logs_and_saves_is_not_trainings(tmp_path: Path) -> None:
    split_is_whole(tmp_path, 3, 6, one_level, callbacks=lambda: [Draws()], log_every=4)


class Terminate(mlopt.Callback):
    def on_step_end(self, run: Any) -> None:
        if run.step == 5 and not run.history[0].get("resumed"):
            os.kill(os.getpid(), signal.SIGTERM)


def test_early_stopping_stops_where_it_would_have_without_a_signal(tmp_path: Path) -> None:
    def stopping() -> mlopt.EarlyStopping:
        return mlopt.EarlyStopping("step", patience=2)  # which only grows

    expected = solve(one_level(), 30, callbacks=[stopping()])
    with pytest.raises(mlopt.Interrupted):
        solve(one_level(), 30, tmp_path, callbacks=[stopping(), Terminate()])
    solution = solve(one_level(), 30, tmp_path, resume=True, callbacks=[stopping()])
    assert (len(solution.history), solution.status) == (len(expected.history), expected.status) == (10, expected.status)


def test_a_state_that_can_never_be_saved_is_an_error_at_the_first_save(tmp_path: Path) -> None:
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
    """A part that looks at the version of what it loads, and keeps a count beside its tensors."""

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


def test_versions_and_extra_state_of_modules_are_carried_over(tmp_path: Path) -> None:
    def build() -> Problem:
        torch.manual_seed(2)
        return one_level(Versioned())

    split_is_whole(tmp_path, 2, 4, build)
    resumed = build()
    solve(resumed, 4, tmp_path / "whole", resume=True)
    assert resumed["x"].module.count == 4


def test_a_rolled_back_step_takes_back_extra_state() -> None:
    problem = one_level(Versioned(), optimizer=partial(SGD, lr=1e30))
    solve(problem, 4, on_nonfinite="rollback")
    assert problem["x"].module.count < 4


def test_batch_normalisation_that_two_levels_share_counts_each_levels_steps() -> None:
    norm = nn.BatchNorm1d(3, affine=False)

    def outer(own: Any, batch: Any, *, net: Any) -> torch.Tensor:
        return (own[0](own[1](INPUTS)) - net[0](INPUTS)).square().mean()

    def inner(own: Any, batch: Any, *, top: Any) -> torch.Tensor:
        return (own[0](own[1](INPUTS)) - top[0](INPUTS)).square().mean()

    sgd = partial(SGD, lr=0.01)
    problem = Problem(
        Level("top", nn.ModuleList([nn.Linear(3, 1), norm]), outer, optimizer=sgd),
        Level("net", nn.ModuleList([nn.Linear(3, 1), norm]), inner, optimizer=sgd, estimator=mlopt.Identity()),
    )
    solve(problem, 5)
    assert norm.num_batches_tracked.item() == 10


def test_what_only_some_batches_log_is_refused_with_a_sentence() -> None:
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
