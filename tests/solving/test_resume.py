"""A run resumed from any of its checkpoints equals the uninterrupted run to the last bit."""

from __future__ import annotations

import errno
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from callback_cases import callback
from option_cases import Weights, solve
from saving_cases import flip
from states import assert_same_state
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset

import mlopt
from mlopt import Level, Problem
from mlopt.solving import serialization

STEPS = 7


class Augmented(Dataset):
    """Examples that draw from the generators of torch and numpy when they are read."""

    def __init__(self, count: int) -> None:
        self.inputs = torch.linspace(-1, 1, 3 * count).reshape(count, 3)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.inputs[index] + 0.1 * torch.randn(3) + float(np.random.rand())


class Net(nn.Module):
    """A network with dropout, with batch normalisation, and with a buffer that is not in its state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += len(x)
        return self.last(nn.functional.dropout(self.norm(self.first(x)).tanh(), 0.3, self.training)).squeeze(1)


class Gradients(mlopt.Callback):
    """Calls `hypergradient`, which draws batches of its own, and records the gradients."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []

    def on_step_end(self, run: Any) -> None:
        self.gradients.append(mlopt.hypergradient(run.problem).gradient["logits"])

    def state_dict(self) -> dict[str, Any]:
        return {"gradients": self.gradients}

    def load_state_dict(self, state: Any) -> None:
        self.gradients = list(state["gradients"])


def build(kind: str) -> Problem:
    """Return a problem with many kinds of state that carry over from step to step."""
    torch.manual_seed(5)

    def outer(own, batch, *, net):
        return {"loss": net(batch).square().mean() + own().square().sum(), "first": own()[0]}

    def mixture(own, batch, *, weights):
        losses = [lambda: (own(batch) - batch.sum(1)).square().mean(), lambda: own(batch).abs().mean()]
        return mlopt.Mixture(losses, weights="weights")

    def plain(own, batch, *, weights):
        w = weights()
        return w[0] * (own(batch) - batch.sum(1)).square().mean() + w[1] * own(batch).abs().mean()

    generator = torch.Generator().manual_seed(11)
    loader = DataLoader(Augmented(11), batch_size=3, shuffle=True, generator=generator)
    held_out = DataLoader(Augmented(6), batch_size=4)
    estimators = {
        "streamed": mlopt.Identity(streamed=True),
        "warm": mlopt.ConjugateGradient(iterations=2, warm_start=True, damping=1.0),
        "history": mlopt.ConjugateGradient(iterations=4, rtol=0.1, damping=1.0, history=3),
        "curvature": mlopt.Neumann(
            iterations=3, step_size=0.1, curvature_data=DataLoader(Augmented(8), batch_size=4, shuffle=True)
        ),
        "unrolled": mlopt.Unrolled(steps=2),
        "fp16": mlopt.FiniteDifference(),
    }
    decay = partial(AdamW, lr=0.02, weight_decay=0.1)
    return Problem(
        Level("weights", Weights((0.0, 0.0), torch.float32), outer, data=held_out, optimizer=partial(Adam, lr=0.05)),
        Level(
            "net",
            Net(),
            mixture if kind == "streamed" else plain,
            data=loader,
            optimizer=partial(SGD, lr=0.05, momentum=0.9) if kind == "unrolled" else decay,
            scheduler={
                "streamed": partial(OneCycleLR, max_lr=0.1, total_steps=3 * STEPS + 4),
                "warm": partial(CosineAnnealingLR, T_max=10),
                "curvature": partial(ReduceLROnPlateau, patience=0),
            }.get(kind),
            steps=3,
            warmup=2,
            accumulate=2 if kind == "warm" else 1,
            clip=1.0,
            precision="fp16" if kind == "fp16" else None,
            estimator=estimators[kind],
        ),
    )


def evaluate(problem: Problem) -> dict[str, float]:
    return {"size": float(problem["weights"].module().detach().norm()) + float(torch.rand(()))}


def play(kind: str, folder: Path, steps: int, *, resume: bool, every: int = 1) -> dict[str, Any]:
    """Solve a problem; return all its results."""
    problem, recording = build(kind), Gradients()
    stopping = mlopt.EarlyStopping("evaluation/size", patience=100)
    log = mlopt.CSVLogger(folder / "log.csv")
    solution = mlopt.solve(
        problem,
        steps,
        seed=3,
        checkpoint=mlopt.Checkpoints(folder, every=every, keep=100),
        resume=resume,
        callbacks=[recording, stopping, log],
        evaluate=evaluate,
        evaluate_every=2,
        log_every=3,
        progress=False,
    )
    return {
        "modules": [t for level in problem for t in (*level.module.parameters(), *level.module.buffers())],
        "gradients": recording.gradients,
        "history": list(solution.history),
        "log": (folder / "log.csv").read_text(),
        "drawn next": torch.rand(()),
        "saved": serialization.read(folder / f"step-{steps:08d}"),
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that returns the results of an uninterrupted run of a kind; each is run once."""
    runs: dict[str, Any] = {}

    def get(kind: str) -> Any:
        if kind not in runs:
            runs[kind] = play(kind, tmp_path_factory.mktemp(kind), STEPS, resume=False)
        return runs[kind]

    return get


@pytest.mark.parametrize("kind", ["streamed", "warm", "history", "curvature", "unrolled", "fp16"])
@pytest.mark.parametrize("cut", [0, 3, STEPS])
def test_a_run_resumed_from_a_checkpoint_equals_the_uninterrupted_one(
    kind: str, cut: int, whole: Any, tmp_path: Path
) -> None:
    expected = whole(kind)
    if cut:
        play(kind, tmp_path, cut, resume=False)
    assert_same_state(play(kind, tmp_path, STEPS, resume=True), expected)


def quadratic(size: int = 3, **arguments: Any) -> Problem:
    """Return a problem of two levels on a vector."""

    def outer(own, batch, *, x):
        return (x() - 1).square().sum() + 0.1 * own().square().sum()

    def inner(own, batch, *, weights):
        return (own() - weights()).square().sum()

    options = {"optimizer": partial(SGD, lr=0.1), "steps": 2, "estimator": mlopt.Identity(), **arguments}
    return Problem(
        Level("weights", mlopt.variables(torch.zeros(size)), outer, optimizer=partial(Adam, lr=0.1)),
        Level("x", mlopt.variables(torch.zeros(size)), inner, **options),
    )


def run(folder: Path, steps: int, problem: Problem | None = None, **options: Any) -> mlopt.Solution:
    return solve(problem or quadratic(), steps, folder, **options)


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (
            lambda: quadratic(4),
            r"level 'weights': parameter 'value' is \(3,\) of torch.float32 in the checkpoint and \(4,\) of",
        ),
        (
            lambda: quadratic(optimizer=partial(Adam, lr=0.1)),
            "the optimizer of level 'x' is SGD in the checkpoint and Adam in the problem",
        ),
        (lambda: build("warm"), "belongs to a problem with the levels weights, x, not weights, net"),
    ],
)
def test_a_checkpoint_of_another_problem_is_refused(other: Any, sentence: str, tmp_path: Path) -> None:
    run(tmp_path, 2)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(mlopt.CheckpointError, match=f"step-00000002: .*{sentence}"):
        run(tmp_path, 3, other(), resume=True)
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"seed": 1}, "has seed=0, not 1"),
        ({"steps": 1}, "is of step 2, beyond steps=1"),
    ],
)
def test_a_run_cannot_be_resumed_with_another_seed_or_fewer_steps(
    options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    run(tmp_path, 2)
    with pytest.raises(mlopt.CheckpointError, match=sentence):
        run(tmp_path, **{"steps": 3, "resume": True, **options})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "rule",
    [
        mlopt.ConjugateGradient(iterations=2, warm_start=True),
        mlopt.Neumann(iterations=1, step_size=0.5, warm_start=True),
        mlopt.MINRES(iterations=2, warm_start=True),
    ],
    ids=str,
)
def test_a_warm_start_of_variables_in_half_precision_keeps_its_dtype(
    rule: mlopt.Estimator, dtype: torch.dtype, tmp_path: Path
) -> None:
    def build() -> Problem:
        matrix = torch.linspace(-1, 1, 18).sin().reshape(6, 3)

        def outer(own, batch, *, y):
            return torch.tanh(matrix @ y().float()).square().mean()

        def inner(own, batch, *, weights):
            error = (torch.tanh(matrix @ own().float()) - 1).square() * weights().sigmoid()
            return error.mean() + 0.1 * own().float().square().sum()

        sgd, start = partial(SGD, lr=0.1), torch.tensor([0.9, 0.4, -0.2], dtype=dtype)
        return Problem(
            Level("weights", mlopt.variables(torch.zeros(6)), outer, optimizer=sgd),
            Level("y", mlopt.variables(start), inner, optimizer=sgd, estimator=rule),
        )

    run(tmp_path / "whole", 4, build())
    run(tmp_path / "cut", 2, build())
    run(tmp_path / "cut", 4, build(), resume=True)
    whole, cut = (serialization.read(tmp_path / name / "step-00000004") for name in ("whole", "cut"))
    assert whole["engine"]["warm"]["y"][0].dtype == torch.float32
    assert_same_state(cut, whole)


def test_a_changed_setting_is_reported(tmp_path: Path) -> None:
    run(tmp_path, 2)
    with pytest.warns(
        mlopt.CheckpointWarning, match="steps of level 'x' was 2 in the checkpoint, and is 5 from this step on"
    ):
        run(tmp_path, 3, quadratic(steps=5), resume=True)


def test_without_a_seed_the_original_seed_is_kept(tmp_path: Path) -> None:
    torch.manual_seed(8)
    run(tmp_path / "whole", 4, seed=None)
    torch.manual_seed(8)
    run(tmp_path / "cut", 2, seed=None)
    torch.manual_seed(9)
    run(tmp_path / "cut", 4, seed=None, resume=True)
    whole, cut = (serialization.read(tmp_path / name / "step-00000004") for name in ("whole", "cut"))
    assert_same_state(cut, whole)


def test_a_new_run_needs_a_folder_without_checkpoints(tmp_path: Path) -> None:
    run(tmp_path, 2)
    with pytest.raises(mlopt.CheckpointError, match="resume=True"):
        run(tmp_path, 2)


def test_resume_needs_a_folder_and_starts_in_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(mlopt.ArgumentError, match="resume=True without checkpoint"):
        mlopt.solve(quadratic(), 1, resume=True)
    assert len(run(tmp_path, 2, resume=True).history) == 2


def test_a_finished_or_stopped_run_takes_no_further_steps(tmp_path: Path) -> None:
    def fail(run: Any) -> None:
        pytest.fail("a step was taken")

    stop = callback(on_step_end=lambda run: run.stop("enough") if run.step == 2 else None)
    run(tmp_path / "stopped", 5, callbacks=[stop])
    run(tmp_path / "finished", 5)
    problem, ended = quadratic(), {"callbacks": [callback(on_step_end=fail)], "resume": True}
    stopped = run(tmp_path / "stopped", 5, problem, **ended)
    assert (stopped.status, len(stopped.history)) == ("enough", 2)
    assert problem["weights"].module.value.abs().min() > 0
    finished = run(tmp_path / "finished", 5, **ended)
    assert (finished.status, len(finished.history)) == ("completed", 5)


def test_a_run_stopped_by_on_save_stays_stopped(tmp_path: Path) -> None:
    stop = callback(on_save=lambda run, folder: run.stop("saved enough") if run.step == 2 else None)
    assert run(tmp_path, 5, callbacks=[stop]).status == "saved enough"
    again = run(tmp_path, 5, resume=True)
    assert (again.status, len(again.history)) == ("saved enough", 2)


def test_a_finished_run_can_be_extended(tmp_path: Path) -> None:
    whole, longer = quadratic(), quadratic()
    solve(whole, 6)
    run(tmp_path, 3)
    run(tmp_path, 6, longer, resume=True)
    assert torch.equal(whole["x"].module.value, longer["x"].module.value)


def test_a_damaged_checkpoint_is_skipped(tmp_path: Path) -> None:
    whole = quadratic()
    run(tmp_path / "whole", 4, whole)
    run(tmp_path / "cut", 3)
    flip(tmp_path / "cut" / "step-00000003" / "tensors.safetensors", 1, 1)
    resumed = quadratic()
    with pytest.warns(mlopt.CheckpointWarning, match=r"skipped .*step-00000003: .*damaged"):
        solution = run(tmp_path / "cut", 4, resumed, resume=True)
    assert torch.equal(resumed["weights"].module.value, whole["weights"].module.value)
    assert [row["step"] for row in solution.history] == [1, 2, 3, 4]


def test_data_too_short_to_resume_are_named(tmp_path: Path) -> None:
    def with_batches(count: int) -> Problem:
        def loss(own, batch):
            return (own() - batch).square().sum()

        data = [torch.ones(1)] * count
        return Problem(Level("x", mlopt.variables(torch.zeros(1)), loss, data=data, optimizer=partial(SGD, lr=0.1)))

    run(tmp_path, 3, with_batches(5))
    with (
        pytest.warns(mlopt.CheckpointWarning, match="batches of level 'x' was 5"),
        pytest.raises(mlopt.ProblemError, match=r"level 'x': its data end after 2 batches, .* had taken 3"),
    ):
        run(tmp_path, 4, with_batches(2), resume=True)


class Filling(mlopt.Callback):
    """Makes every save from the second step on fail, like a full disk, until step `until`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, until: int) -> None:
        self._patch, self._until = monkeypatch, until

    def on_step_end(self, run: Any) -> None:
        if run.step == 2:
            real = serialization.write

            def full(folder: Path, state: Any) -> None:
                if run.step < self._until:
                    raise OSError(errno.ENOSPC, "No space left on device")
                real(folder, state)

            self._patch.setattr(serialization, "write", full)


def test_a_full_disk_is_reported_and_the_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(
        mlopt.CheckpointWarning, match="No space left on device.*the newest complete checkpoint is step-00000001"
    ) as warned:
        solution = run(tmp_path, 5, callbacks=[Filling(monkeypatch, until=4)])
    assert len(warned) == 2
    assert len(solution.history) == 5
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


@pytest.mark.filterwarnings("ignore::mlopt.CheckpointWarning")
def test_a_full_disk_at_the_end_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = quadratic()
    with pytest.raises(mlopt.CheckpointError, match="No space left on device"):
        run(tmp_path, 5, problem, callbacks=[Filling(monkeypatch, until=100)])
    # The modules hold the results nevertheless.
    expected = quadratic()
    solve(expected, 5)
    assert torch.equal(problem["x"].module.value, expected["x"].module.value)


def test_the_best_checkpoint_is_kept(tmp_path: Path) -> None:
    scores = iter([0.3, 0.9, 0.5, 0.6])
    checkpoints = mlopt.Checkpoints(tmp_path, every=1, keep=1, best="evaluation/accuracy", greater_is_better=True)
    run(tmp_path, 4, checkpoint=checkpoints, evaluate=lambda problem: {"accuracy": next(scores)})
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["step-00000002", "step-00000004"]


def test_a_missing_column_is_reported_but_not_one_logged_later(tmp_path: Path) -> None:
    later = {"evaluate": lambda problem: {"accuracy": 1.0}, "evaluate_every": 3}
    for column in ("evaluation/acuracy", "weights/los"):
        checkpoints = mlopt.Checkpoints(tmp_path / column, every=1, best=column)
        with pytest.warns(
            mlopt.CheckpointWarning, match=f"best='{column}' has not been logged.*the history has step, "
        ):
            run(tmp_path, 4, checkpoint=checkpoints, **later)
    checkpoints = mlopt.Checkpoints(tmp_path / "right", every=1, best="evaluation/accuracy")
    run(tmp_path, 4, checkpoint=checkpoints, **later)
