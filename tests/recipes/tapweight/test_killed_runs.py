"""A run of TapWeight that is killed at a random moment and resumed ends bit-equal to an uninterrupted one."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from states import assert_same_state

from mlopt.solving import serialization

#: Files that hold wall-clock times, or a picture.
_FREE = {"weights.png", "environment.json", "began"}
_CONTEXT = multiprocessing.get_context("forkserver")


def play(folder: Path) -> Any:
    """Start the process of a run."""
    import killed_run

    process = _CONTEXT.Process(target=killed_run.main, args=(folder, folder / "began"))
    process.start()
    return process


def finish(folder: Path) -> None:
    process = play(folder)
    process.join(timeout=600)
    assert process.exitcode == 0


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """Return the folder of an uninterrupted run, and its seconds."""
    # One process imports everything once, and the runs are forked from it.
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    _CONTEXT.set_forkserver_preload(["killed_run"])
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = begin(folder)
    start = time.monotonic()
    process.join(timeout=600)
    assert process.exitcode == 0
    return folder, time.monotonic() - start


def begin(folder: Path) -> Any:
    """Return the process of a run that has started to step."""
    process = play(folder)
    while not (folder / "began").exists():
        assert process.is_alive()
        time.sleep(0.001)
    (folder / "began").unlink()
    return process


def interrupt(folder: Path, seconds: float) -> bool:
    """Kill a run some seconds after it started to step; return False if it had ended."""
    process = begin(folder)
    process.join(timeout=seconds)
    alive = process.is_alive()
    process.kill()
    process.join()
    return alive


def assert_equal(folder: Path, other: Path) -> None:
    """Compare two finished runs: results, logs, and the whole last checkpoint of each phase."""
    names = {file.name for file in other.iterdir() if file.is_file()} - _FREE
    assert {"history.csv", "log.csv", "weights.json", "scores.json"} <= names
    for name in names:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    encoder = "encoder/model.safetensors"
    assert (folder / encoder).read_bytes() == (other / encoder).read_bytes()
    phases = sorted(phase.name for phase in (other / "checkpoints").iterdir() if phase.is_dir())
    assert len(phases) == 13  # two rehearsals of each of three objectives among them
    for phase in phases:
        last, expected = (max((run / "checkpoints" / phase).glob("step-*")) for run in (folder, other))
        assert last.name == expected.name
        assert_same_state(serialization.read(last), serialization.read(expected), phase)


def killed_once(moments: int, seed: int) -> Callable[..., None]:
    def test(uninterrupted: tuple[Path, float], tmp_path: Path) -> None:
        whole, seconds = uninterrupted
        draw = random.Random(seed)
        for k in range(moments):
            folder, moment = tmp_path / str(k), draw.random() * seconds
            while True:
                folder.mkdir()
                if interrupt(folder, moment):
                    break
                # It had ended already: the speed of a machine varies.
                shutil.rmtree(folder)
                moment *= 0.7
            finish(folder)
            assert_equal(folder, whole)

    return test


test_killed_at_three_moments = killed_once(3, seed=0)
test_killed_at_twenty_moments = pytest.mark.slow(killed_once(20, seed=1))


def test_killed_again_and_again(uninterrupted: tuple[Path, float], tmp_path: Path) -> None:
    whole, seconds = uninterrupted
    for _ in range(4):
        interrupt(tmp_path, 0.2 * seconds)
    finish(tmp_path)
    assert_equal(tmp_path, whole)
