"""SIGTERM and SIGINT: the step is finished, the run saved, and the process exits with 0 or 130 and a message."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_cases import callback
from states import assert_same_state
from torch.optim import SGD

import mlopt
from mlopt.solving import serialization
from mlopt.solving.interruption import Interruption

SCRIPT = """
import signal, sys, time
from functools import partial
import torch, mlopt

def loss(own, batch):
    return (own() - torch.rand(2)).square().sum()

class Slow(mlopt.Callback):
    def on_step_end(self, run):
        print(run.step, flush=True)
        time.sleep(0.02)

level = mlopt.Level("x", mlopt.variables(torch.zeros(2)), loss, optimizer=partial(torch.optim.SGD, lr=0.1))
mlopt.solve(mlopt.Problem(level), int(sys.argv[2]), seed=0, checkpoint=mlopt.Checkpoints(sys.argv[1], every=1000),
            resume=True, callbacks=[Slow()], progress=False)
print("not reached" if sys.argv[3:] else "done")
"""


def start(folder: Path, steps: int, *more: str, ignored: bool = False) -> subprocess.Popen[str]:
    # If a shell runs the tests in the background, they and their children ignore SIGINT.
    handling = "SIG_IGN" if ignored else "default_int_handler"
    code = f"import signal; signal.signal(signal.SIGINT, signal.{handling})\n{SCRIPT}"
    arguments = [sys.executable, "-c", code, str(folder), str(steps), *more]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("kind", "code"), [("SIGTERM", 0), ("SIGINT", 130)])
def test_the_step_is_finished_and_saved_and_the_run_resumes_there(kind: str, code: int, tmp_path: Path) -> None:
    process = start(tmp_path, 10_000, "more")
    assert process.stdout
    while process.stdout.readline() != "3\n":
        assert process.poll() is None
    process.send_signal(getattr(signal, kind))
    out, error = process.communicate(timeout=300)
    assert process.returncode == code
    step, _, _ = mlopt.Checkpoints(tmp_path).newest()
    assert out.split() == [str(k) for k in range(4, step + 1)]
    assert error == (
        f"mlopt: {kind}: step {step} of 10000 is finished and saved in {tmp_path}; pass resume=True (--resume on the command "
        "line) to continue\n"
    )
    for folder in (tmp_path, tmp_path / "whole"):
        process = start(folder, step + 3)
        process.communicate(timeout=300)
        assert process.returncode == 0
    cut, whole = (serialization.read(folder / f"step-{step + 3:08d}") for folder in (tmp_path, tmp_path / "whole"))
    assert_same_state(cut, whole)


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    process = start(tmp_path, 30, ignored=True)
    assert process.stdout
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert out.endswith("30\ndone\n")


@pytest.fixture(autouse=True)
def _signals_as_in_the_foreground() -> Iterator[None]:
    """Let SIGINT interrupt this process, even if the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def step_problem() -> mlopt.Problem:
    def loss(own: Any, batch: Any) -> torch.Tensor:
        return own().square().sum()

    return mlopt.Problem(mlopt.Level("x", mlopt.variables(torch.ones(2)), loss, optimizer=partial(SGD, lr=0.1)))


def interrupt(step: int, times: int = 1) -> mlopt.Callback:
    """Return a callback that sends SIGINT at the end of a step."""

    def on_step_end(run: Any) -> None:
        for _ in range(times if run.step == step else 0):
            os.kill(os.getpid(), signal.SIGINT)

    return callback(on_step_end=on_step_end)


def test_callbacks_end_and_handlers_are_restored(tmp_path: Path) -> None:
    ended: list[Any] = []
    record = callback(
        on_save=lambda run, folder: ended.append(folder.name), on_train_end=lambda run: ended.append(run.step)
    )
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(mlopt.Interrupted) as raised:
        mlopt.solve(step_problem(), 9, checkpoint=tmp_path, callbacks=[interrupt(2), record], progress=False)
    assert raised.value.code == 130
    assert ended == ["step-00000002", 2]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_signal_interrupts_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        mlopt.solve(step_problem(), 9, checkpoint=tmp_path, callbacks=[interrupt(2, times=2)], progress=False)


def test_without_checkpoints_signals_keep_their_handlers() -> None:
    with pytest.raises(KeyboardInterrupt):
        mlopt.solve(step_problem(), 9, callbacks=[interrupt(2)], progress=False)


def test_a_run_in_another_thread_completes(tmp_path: Path) -> None:
    statuses: list[Any] = []

    def go() -> None:
        statuses.append(mlopt.solve(step_problem(), 3, checkpoint=tmp_path, progress=False).status)

    thread = threading.Thread(target=go)
    thread.start()
    thread.join()
    assert statuses == ["completed"]


def test_warm_up_is_interrupted_and_resumed_too(tmp_path: Path) -> None:
    """A resumed run does not repeat warm-up steps."""
    taken: list[int] = []

    def outer(own: Any, batch: Any, *, x: Any) -> torch.Tensor:
        return (x() - own()).square().sum()

    def inner(own: Any, batch: Any, *, y: Any) -> torch.Tensor:
        taken.append(1)
        if len(taken) in (3, 4):
            os.kill(os.getpid(), signal.SIGTERM)
        return own().square().sum() + y().sum()

    def build() -> mlopt.Problem:
        sgd = partial(SGD, lr=0.1)
        return mlopt.Problem(
            mlopt.Level("y", mlopt.variables(torch.ones(2)), outer, optimizer=sgd),
            mlopt.Level(
                "x", mlopt.variables(torch.ones(2)), inner, optimizer=sgd, warmup=5, estimator=mlopt.FiniteDifference()
            ),
        )

    with pytest.raises(mlopt.Interrupted):
        mlopt.solve(build(), 1, checkpoint=tmp_path, seed=0, progress=False)
    assert len(taken) == 3
    with pytest.raises(mlopt.Interrupted):
        mlopt.solve(build(), 1, checkpoint=tmp_path, resume=True, seed=0, progress=False)
    assert len(taken) == 4
    resumed = build()
    mlopt.solve(resumed, 0, checkpoint=tmp_path, seed=0, resume=True, progress=False)
    # Four SGD steps on x^2 multiply x by 0.8 each; the tolerance is a few roundings of float32.
    torch.testing.assert_close(resumed["x"].module.value.detach(), torch.full((2,), 0.8**4), rtol=1e-6, atol=0)
    taken.extend([1] * 10)
    mlopt.solve(build(), 1, checkpoint=tmp_path / "whole", seed=0, progress=False)
    mlopt.solve(build(), 1, checkpoint=tmp_path, seed=0, resume=True, progress=False)
    cut, whole = (serialization.read(folder / "step-00000001") for folder in (tmp_path, tmp_path / "whole"))
    assert_same_state(cut["engine"]["levels"], whole["engine"]["levels"])


def test_a_signal_inside_the_context_is_recorded() -> None:
    with Interruption() as interruption:
        assert interruption.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.received is signal.SIGTERM
