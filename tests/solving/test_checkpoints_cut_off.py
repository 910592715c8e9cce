"""Whatever fails or cuts off a save, there is a whole checkpoint to go on from."""

from __future__ import annotations

import builtins
import errno
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from saving_cases import delete, is_of, names, newest, saved, state_of

from mlopt.errors import CheckpointError
from mlopt.solving import serialization
from mlopt.solving.checkpoints import Checkpoints

CALLS = [(os, "rename"), (os, "fsync"), (os, "mkdir"), (os, "open"), (os, "unlink"), (os, "rmdir"), (builtins, "open")]


def failing(monkeypatch, n, error, calls=CALLS, forever=False):
    """Have the n-th call to the system raise, and with `forever` every later one; return how many there were."""
    count = [0]

    def wrapped(real):
        def call(*arguments, **options):
            count[0] += 1
            if count[0] == n or (forever and count[0] > n):
                raise error
            return real(*arguments, **options)

        return call

    for module, name in calls:
        monkeypatch.setattr(module, name, wrapped(getattr(module, name)))
    return count


@pytest.mark.parametrize(
    ("step", "code"), [(2, errno.ENOSPC), (3, errno.EIO)], ids=["the same step again", "a new step"]
)
def test_whichever_call_fails_the_checkpoints_before_are_whole(tmp_path, step, code):
    """Writing must fail with a sentence; removing what is old may fail with a warning."""
    failed = 0
    for n in range(1, 200):
        folder = tmp_path / str(n)
        checkpoints = saved(folder, 1, 2, keep=2)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            count = failing(patch, n, OSError(code, os.strerror(code), "a place"), calls=CALLS[:4] + CALLS[6:])
            try:
                checkpoints.save(step, {"step": "new"})
                error = None
            except CheckpointError as told:
                error = str(told)
        if error is None:
            state = checkpoints.newest()[2]
            assert state == {"step": "new"}
            if count[0] < n:
                break
            assert caught or (folder / "step-00000001").is_dir()
            continue
        failed += 1
        assert f"step-0000000{step} cannot be saved: {os.strerror(code)} (a place); " in error
        assert "the newest complete checkpoint is step-0000000" in error
        assert not list(folder.glob("partial-*"))
        found = checkpoints.newest()
        if found[2] == {"step": "new"}:
            # Its name could not be flushed to the disk; what it replaces is still there too.
            assert found[0] == step
            assert "is step-0000000" + str(step) in error
            assert (folder / "step-00000001").is_dir()
            assert step == 3 or is_of(serialization.read(folder / "replaced-step-00000002"), 2)
        else:
            assert "is step-00000002" in error
            assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        checkpoints.save(step, state_of(step))
        assert newest(checkpoints) == (step, [])
        assert all(name.startswith("step-") for name in names(folder))
    else:
        pytest.fail("the number of calls was not reached")
    assert failed >= 8


class PowerCutError(BaseException):
    """What nothing handles."""


@pytest.mark.parametrize("step", [2, 3], ids=["the same step again", "a new step"])
@pytest.mark.parametrize("whole", [True, False], ids=["all whole", "the only whole one replaced"])
def test_wherever_a_save_is_cut_off_a_whole_one_is_found(tmp_path, step, whole):
    """As if the process had died before any one of its calls: none that follows is made, none that clears up either."""
    for n in range(1, 200):
        folder = tmp_path / str(n)
        checkpoints = saved(folder, 1, 2, keep=2)
        if not whole:
            delete(folder / "step-00000001" / "state.json")
        with pytest.MonkeyPatch.context() as patch:
            count = failing(patch, n, PowerCutError(), forever=True)
            try:
                checkpoints.save(step, state_of(step))
            except PowerCutError:
                pass
            else:
                assert count[0] < n
                break
        # `newest` holds what it reads against the number of its step.
        found = newest(checkpoints)[0]
        assert found in (2, step)
        checkpoints.prepare(resume=True)
        assert newest(checkpoints) == (found, [])
        assert all(name.startswith("step-") for name in names(folder))
    else:
        pytest.fail("the number of calls was not reached")
    assert n > 15


def test_where_the_first_save_fails_it_says_that_there_is_nothing_to_go_on_from(tmp_path, monkeypatch):
    failing(monkeypatch, 1, OSError(errno.EDQUOT, "Disk quota exceeded"))
    with pytest.raises(
        CheckpointError, match=r"Disk quota exceeded; free some of your quota.*; there is no complete checkpoint"
    ):
        Checkpoints(tmp_path).save(1, state_of(1))


def test_what_cannot_be_saved_leaves_no_trace(tmp_path):
    checkpoints = saved(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"levels\.x is a object; a checkpoint holds"):
        checkpoints.save(2, {"levels": {"x": object()}})
    assert names(tmp_path) == ["step-00000001"]


def in_a_child(code, folder):
    """Run code in a process of its own, which is free to limit itself and to kill its children."""
    head = """
import os, random, resource, signal, sys, time
from pathlib import Path
from mlopt.errors import CheckpointError
from mlopt.solving.checkpoints import Checkpoints
from saving_cases import *
folder = Path(sys.argv[1])
"""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", head + code, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


KILLED = """
checkpoints = Checkpoints(folder)
begin = time.monotonic()
checkpoints.save(0, state_of(0, 20_000))
seconds = time.monotonic() - begin
for k in range(20):
    first = checkpoints.newest()[0]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        # Each step twice: now going on, now replacing what is there.
        for count in range(1, 10_000):
            step = first + count // 2
            checkpoints.save(step, state_of(step, 20_000))
            os.write(writer, b".")
    os.read(reader, 1)
    time.sleep(3 * seconds * random.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    left = not all(name.startswith("step-") for name in names(folder))
    for _ in range(2):
        step, place, state = checkpoints.newest()
        assert step >= first and is_of(state, step, 20_000)
        checkpoints.prepare(resume=True)
        assert all(name.startswith("step-") for name in names(folder))
    print(step, left)
"""


def test_killed_at_any_moment_the_newest_is_whole(tmp_path):
    rows = [line.split() for line in in_a_child(KILLED, tmp_path).splitlines()]
    assert len(rows) == 20
    # Saves went on, and some were cut off half-way.
    assert int(rows[-1][0]) > 0
    assert any(left == "True" for _, left in rows)


FULL = """
checkpoints = Checkpoints(folder)
checkpoints.save(1, state_of(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    checkpoints.save(2, state_of(2, 20_000))
except CheckpointError as error:
    print(error)
print(names(folder), newest(checkpoints))
"""


def test_a_file_that_does_not_fit_is_told(tmp_path):
    told, left = in_a_child(FULL, tmp_path).splitlines()
    assert "step-00000002 cannot be saved: File too large; raise the limit on the size of a file" in told
    assert told.endswith("the newest complete checkpoint is step-00000001")
    assert left == "['step-00000001'] (1, [])"
