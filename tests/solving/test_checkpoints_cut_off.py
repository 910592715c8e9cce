"""After any failure or interruption of a save, a complete checkpoint remains to resume from."""

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
    """Let the n-th system call raise, and with `forever` every later one too; return the count of calls."""
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
def test_if_any_call_fails_the_earlier_checkpoints_are_complete(tmp_path, step, code):
    """A failed write raises one sentence; a failed removal of an old checkpoint may only warn."""
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
            except CheckpointError as raised:
                error = str(raised)
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
        newest_step, _, state = checkpoints.newest()
        if state == {"step": "new"}:
            # Its name could not be flushed to the disk; the checkpoint that it replaces is still there too.
            assert newest_step == step
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
    """An exception that no handler catches."""


@pytest.mark.parametrize("step", [2, 3], ids=["the same step again", "a new step"])
@pytest.mark.parametrize("whole", [True, False], ids=["all whole", "the only whole one replaced"])
def test_after_an_interruption_at_any_call_a_complete_checkpoint_remains(tmp_path, step, whole):
    """Simulate the end of the process before each call: no later call is made, not even to clean up."""
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
        # `newest` compares the content with the number of its step.
        remaining = newest(checkpoints)[0]
        assert remaining in (2, step)
        checkpoints.prepare(resume=True)
        assert newest(checkpoints) == (remaining, [])
        assert all(name.startswith("step-") for name in names(folder))
    else:
        pytest.fail("the number of calls was not reached")
    assert n > 15


def test_a_failed_first_save_reports_that_there_is_no_checkpoint(tmp_path, monkeypatch):
    failing(monkeypatch, 1, OSError(errno.EDQUOT, "Disk quota exceeded"))
    with pytest.raises(
        CheckpointError, match=r"Disk quota exceeded; free some of your quota.*; there is no complete checkpoint"
    ):
        Checkpoints(tmp_path).save(1, state_of(1))


def test_an_unsaveable_state_leaves_no_files(tmp_path):
    checkpoints = saved(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"levels\.x is a object; a checkpoint holds"):
        checkpoints.save(2, {"levels": {"x": object()}})
    assert names(tmp_path) == ["step-00000001"]


def in_a_child(code, folder):
    """Run code in a separate process, which may limit its resources and kill its children."""
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
        # Each step is saved twice: first new, then in place of itself.
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


def test_after_a_kill_at_any_moment_the_newest_checkpoint_is_complete(tmp_path):
    rows = [line.split() for line in in_a_child(KILLED, tmp_path).splitlines()]
    assert len(rows) == 20
    # Saves succeeded between the kills, and some were interrupted.
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


def test_a_file_above_the_size_limit_is_reported(tmp_path):
    message, left = in_a_child(FULL, tmp_path).splitlines()
    assert "step-00000002 cannot be saved: File too large; raise the limit on the size of a file" in message
    assert message.endswith("the newest complete checkpoint is step-00000001")
    assert left == "['step-00000001'] (1, [])"
