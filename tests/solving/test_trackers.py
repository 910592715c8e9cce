"""Trackers receive every row once under its outer step, also in resumed runs, NaN included."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from callback_cases import play

import mlopt

ROWS = [{"net/loss": 1.0 / k} for k in range(1, 10)]
ROWS[1]["net/loss"] = math.nan
ROWS[4] |= {"evaluation/m": math.inf}


class Recorder:
    """Replaces the modules wandb, trackio and mlflow; records the rows of each run."""

    def __init__(self):
        self.runs, self.begun, self.ended, self.online = {}, [], [], True

    def init(self, **arguments):
        self.begun.append(arguments)
        given = [arguments[key] for key in ("id", "name", "run_id") if key in arguments]
        self.id = self.name = self.run_id = given[0] if given else f"run {len(self.runs) + 1}"
        self.rows, self.summary, self.info = self.runs.setdefault(self.id, []), {}, self
        self.starting_step = self.rows[-1][0] + 1 if self.rows and self.online else 0
        return self

    def log(self, row, step):
        self.rows.append((step, repr(row)))

    def finish(self):
        self.ended.append(dict(self.summary))

    start_run, end_run = init, finish

    def log_metrics(self, row, step, run_id):
        assert run_id == self.id
        self.log(row, step)

    def set_tag(self, name, value):
        self.summary[name] = value


LOGGERS = {
    "wandb": (mlopt.WandbLogger, {"project": "p"}, {"project": "p", "id": "run 1", "resume": "allow"}),
    "trackio": (mlopt.TrackioLogger, {"project": "p"}, {"project": "p", "name": "run 1", "resume": "allow"}),
    "mlflow": (mlopt.MLflowLogger, {"tags": {}}, {"tags": {}, "run_id": "run 1"}),
}
#: Rows by step, as text: NaN is not equal to itself.
EXPECTED = [(step, repr(row)) for step, row in enumerate(ROWS, 1)]


@pytest.fixture(params=list(LOGGERS))
def recorded(request, monkeypatch):
    """Return a replacement of the module, a function that makes the logger, and the arguments of `init` at first and later."""
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, request.param, recorder)
    kind, arguments, resumed = LOGGERS[request.param]
    return recorder, lambda: kind(**arguments), arguments, resumed


@pytest.mark.parametrize("log_every", [1, 4, 20])
def test_every_row_is_sent_under_its_step(recorded, log_every):
    recorder, make, arguments, _ = recorded
    play(ROWS, make, log_every=log_every, status="enough")
    assert recorder.runs == {"run 1": EXPECTED}
    assert recorder.begun == [arguments]
    assert recorder.ended == [{} if isinstance(make(), mlopt.TrackioLogger) else {"status": "enough"}]


@pytest.mark.parametrize("log_every", [1, 4, 20])
def test_a_resumed_run_continues_in_the_same_tracker_run_with_the_first_unsent_row(recorded, log_every):
    recorder, make, arguments, resumed = recorded
    play(ROWS, make, log_every=log_every, save_at=6, killed_at=8)
    assert recorder.begun == [arguments, resumed]
    before, at_checkpoint = 8 - 8 % log_every, 6 - 6 % log_every
    if isinstance(make(), mlopt.WandbLogger):
        at_checkpoint = before
    assert recorder.runs == {"run 1": EXPECTED[:before] + EXPECTED[at_checkpoint:]}


def test_a_run_resumed_from_its_warm_up_continues_in_the_same_tracker_run(recorded):
    recorder, make, arguments, resumed = recorded
    play(ROWS, make, save_at=0, killed_at=2)
    assert recorder.begun == [arguments, resumed]
    assert list(recorder.runs) == ["run 1"]


def test_rows_that_an_error_leaves_unlogged_are_sent_at_the_end(recorded):
    recorder, make, _, _ = recorded
    logger = make()
    logger.on_log = lambda run, rows: None
    play(ROWS, lambda: logger)
    assert recorder.runs == {"run 1": EXPECTED}


def test_wandb_offline_receives_every_row_again(monkeypatch):
    """The files of both parts are synchronised later, so the second part cannot know which rows the first one has."""
    recorder = Recorder()
    recorder.online = False
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    play(ROWS, mlopt.WandbLogger, save_at=6, killed_at=8)
    assert recorder.runs == {"run 1": EXPECTED[:8] + EXPECTED}


def test_another_run_starts_another_tracker_run(recorded):
    recorder, make, arguments, _ = recorded
    logger = make()
    play(ROWS, lambda: logger)
    play(ROWS, lambda: logger)
    assert recorder.runs == {"run 1": EXPECTED, "run 2": EXPECTED}
    assert recorder.begun == [arguments, arguments]


@pytest.mark.parametrize(
    ("make", "module", "command"),
    [
        (lambda: mlopt.TensorBoardLogger("x"), "tensorboard", "pip install 'mlopt-torch\\[tracking\\]'"),
        (mlopt.WandbLogger, "wandb", "pip install wandb"),
        (mlopt.TrackioLogger, "trackio", "pip install trackio"),
        (mlopt.MLflowLogger, "mlflow", "pip install mlflow"),
    ],
)
def test_a_missing_package_is_named_when_the_logger_is_made(make, module, command, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=command):
        make()


# The trackers themselves


def scalars(folder):
    """Return the values by step that TensorBoard shows of a folder, by name."""
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    events = accumulators.EventAccumulator(str(folder))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.mark.parametrize("log_every", [1, 2, 4, 20])
@pytest.mark.parametrize("killed_at", [6, 8])
def test_tensorboard_shows_a_resumed_run_like_an_uninterrupted_one(tmp_path, log_every, killed_at):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    play(ROWS, lambda: mlopt.TensorBoardLogger(tmp_path / "whole"), log_every=log_every)
    shown = scalars(tmp_path / "whole")
    assert [step for step, _ in shown["net/loss"]] == list(range(1, 10))
    losses = [row["net/loss"] for row in ROWS]
    assert [value for _, value in shown["net/loss"]] == pytest.approx(losses, rel=1e-7, nan_ok=True)
    assert shown["evaluation/m"] == [(5, math.inf)]
    assert set(shown) == {"net/loss", "evaluation/m"}
    make = lambda: mlopt.TensorBoardLogger(tmp_path / "resumed")  # noqa: E731
    play(ROWS, make, log_every=log_every, save_at=6, killed_at=killed_at)
    assert repr(scalars(tmp_path / "resumed")) == repr(shown)


def test_tensorboard_shows_rows_as_soon_as_they_are_logged(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    shown = []

    class Watch(mlopt.TensorBoardLogger):
        def on_log(self, run, rows):
            super().on_log(run, rows)
            shown.append(len(scalars(tmp_path)["net/loss"]))

    play(ROWS, lambda: Watch(tmp_path), log_every=4)
    assert shown == [4, 8, 9]


def test_tensorboard_shows_only_the_steps_of_the_resumed_run(tmp_path):
    """The first run had other values after the checkpoint, and more of them."""
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    play([{"a": 1.0}] * 8, lambda: mlopt.TensorBoardLogger(tmp_path))
    state = {"id": "", "sent": 3}

    class Resumed(mlopt.TensorBoardLogger):
        def load_state_dict(self, saved):
            super().load_state_dict(state)

    # Only the second part of this run is written to the folder; the first part goes to another one.
    folders = iter([tmp_path / "other", tmp_path])
    play([{"a": 2.0}] * 5, lambda: Resumed(next(folders)), save_at=3, killed_at=3)
    assert scalars(tmp_path)["a"] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0)]


PART = """
import json, os, signal, sys, time
import mlopt
from callback_cases import play_on, play_until_killed
from test_trackers import REAL, ROWS

make = REAL[sys.argv[1]]
if sys.argv[2] == "first":
    with open("saved.json", "w") as file:
        json.dump(play_until_killed(ROWS, make, log_every=2, save_at=6, killed_at=8), file)
    time.sleep(2)
    os.kill(os.getpid(), signal.SIGKILL)
play_on(ROWS, make, json.load(open("saved.json")), log_every=2, status="enough")
"""
REAL = {
    "wandb": lambda: mlopt.WandbLogger(project="demo"),
    "trackio": lambda: mlopt.TrackioLogger(project="demo", auto_log_cpu=False),
    "mlflow": lambda: mlopt.MLflowLogger(run_name="demo"),
}


@pytest.fixture
def killed_and_resumed(tmp_path):
    """Return a function that logs ROWS to a tracker from two processes, kills the first one, and returns the folder."""

    def play_twice(name):
        own = {"WANDB_MODE": "offline", "TRACKIO_DIR": "trackio", "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}
        paths = os.pathsep.join(map(str, (Path(mlopt.__file__).parents[1], Path(__file__).parent)))
        environment = os.environ | own | {"PYTHONPATH": paths}
        for part, code in (("first", -signal.SIGKILL), ("second", 0)):
            command = [sys.executable, "-c", PART, name, part]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == code, done.stdout + done.stderr
        return tmp_path

    return play_twice


def test_mlflow_keeps_one_run(killed_and_resumed):
    pytest.importorskip("mlflow", reason="needs mlflow, which no extra installs")
    pytest.importorskip("sqlalchemy", reason="needs sqlalchemy, for MLflow's store")
    with contextlib.closing(sqlite3.connect(killed_and_resumed("mlflow") / "mlflow.db")) as store:
        assert store.execute("SELECT name, status FROM runs").fetchall() == [("demo", "FINISHED")]
        assert store.execute("SELECT value FROM tags WHERE key = 'status'").fetchall() == [("enough",)]
        rows = store.execute("SELECT step, value, is_nan FROM metrics WHERE key = 'net/loss' ORDER BY step").fetchall()
        evaluations = store.execute("SELECT step, value FROM metrics WHERE key = 'evaluation/m'").fetchall()
    logged = [(step, math.nan if is_nan else value) for step, value, is_nan in rows]
    expected = [(step, ROWS[step - 1]["net/loss"]) for step in (1, 2, 3, 4, 5, 6, 7, 7, 8, 8, 9)]
    assert repr(logged) == repr(expected)
    assert evaluations == [(5, sys.float_info.max)]


def test_trackio_keeps_one_run(killed_and_resumed):
    pytest.importorskip("trackio", reason="needs trackio, which no extra installs")
    folder = killed_and_resumed("trackio")
    with contextlib.closing(sqlite3.connect(folder / "trackio" / "demo.db")) as store:
        rows = store.execute("SELECT run_id, step, metrics FROM metrics").fetchall()
    assert len({run for run, _, _ in rows}) == 1
    expected = [(step, row | {"net/loss": "NaN"} if step == 2 else row) for step, row in enumerate(ROWS, 1)]
    expected[4][1]["evaluation/m"] = "Infinity"
    assert [(step, json.loads(text)) for _, step, text in rows] == expected[:8] + expected[6:]


def test_wandb_keeps_one_run_and_its_second_file_has_all_rows(killed_and_resumed):
    records = pytest.importorskip("wandb.proto.wandb_internal_pb2", reason="needs wandb, which no extra installs")
    files = sorted(killed_and_resumed("wandb").glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1
    logged = []
    for data in log_records(files[1].read_bytes()[7:]):
        record = records.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            values = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            row = {name: float(json.loads(values[name])) for name in ROWS[4] if name in values}
            logged.append((int(values["_step"]), repr(row)))
    assert logged == EXPECTED


def log_records(data):
    """Yield the records of a log in the format of LevelDB, which splits them over blocks of 32 KiB."""
    position, record = 0, b""
    while position + 7 <= len(data):
        # The header of seven bytes is part of the first block.
        left = 32768 - (position + 7) % 32768
        if left < 7:
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):
            yield record
            record = b""
