"""One of two processes is killed at a random moment of a run: the other ends soon, and the run resumes without a difference."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import process_cases
import pytest
import torch
from processes import in_processes

import mlopt

#: Outer steps of a run, and the least seconds of a step, so that a moment within the run can be drawn.
STEPS, PAUSE = 40, 0.02


class Killed(mlopt.Callback):
    """Lets another program send a signal to one process, some seconds after the first step begins; slows each step down."""

    def __init__(self, rank: int, number: int, after: float) -> None:
        self._rank, self._number, self._after = rank, number, after

    def on_step_begin(self, run: Any) -> None:
        if run.step == 0 and os.environ["RANK"] == str(self._rank):
            subprocess.Popen(["sh", "-c", f"sleep {self._after}; kill -{self._number} {os.getpid()}"])
        time.sleep(PAUSE)


def cut_off(folder: Path, rank: int, number: int, after: float) -> Any:
    """Return how a run ends in this process, and its seconds."""
    begun = time.monotonic()

    def run(group: Any) -> Any:
        killed = Killed(rank, number, after)
        checkpoint = mlopt.Checkpoints(folder, every=3)
        try:
            return process_cases.run_of(
                process_cases.resumable(group), STEPS, checkpoint=checkpoint, callbacks=[killed]
            )
        except mlopt.Interrupted:
            return "interrupted"

    return process_cases.outcome(run), time.monotonic() - begun


def resumed(folder: Path) -> process_cases.Values:
    return process_cases.run_of(process_cases.resumable("default"), STEPS, checkpoint=folder, resume=True)


@pytest.fixture(scope="module")
def uninterrupted() -> process_cases.Values:
    return process_cases.run_of(process_cases.resumable(None), STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_run_survives_the_end_of_one_process(seed: int, tmp_path: Path, uninterrupted: process_cases.Values) -> None:
    drawn, number = random.Random(seed), (signal.SIGKILL, signal.SIGTERM)[seed % 2]
    rank, after = drawn.randrange(2), drawn.uniform(0, 0.9 * STEPS * PAUSE)
    folder, first, second = (tmp_path / name for name in ("run", "first", "second"))
    first.mkdir()
    ends = in_processes(2, cut_off, folder, rank, number, after, folder=first, ends=[rank])
    if number == signal.SIGTERM:  # both finish the same step, and save it
        assert [end for end, _ in ends] == ["interrupted"] * 2
    else:
        assert ends[rank] is None
        (kind, message), seconds = ends[1 - rank]
        assert kind == "ProcessError"
        assert message.startswith(f"process {1 - rank} of 2 could not exchange values with the others")
        assert seconds < 60
    if drawn.randrange(2):
        second.mkdir()
        values = in_processes(2, resumed, folder, folder=second)
    else:
        values = [resumed(folder)]
    for own in values:
        assert own.keys() == uninterrupted.keys()
        for key, expected in uninterrupted.items():
            assert torch.allclose(own[key], expected, rtol=1e-12, atol=1e-14, equal_nan=True), key
