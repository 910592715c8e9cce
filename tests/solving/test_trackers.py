"""What trackers are sent: every row once under its outer step, in resumed runs too, NaN included."""

from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace

import pytest
from callback_cases import play

import mlopt

ROWS = [{"net/loss": 1.0 / k} for k in range(1, 10)]
ROWS[1]["net/loss"] = math.nan
ROWS[4] |= {"evaluation/m": math.inf}


class Recorder:
    """Stands in for the modules wandb, trackio and mlflow: notes what is called with what."""

    def __init__(self):
        self.calls, self.made = [], 0

    def _begin(self, identity):
        self.made += not identity
        self.rows, self.summary = {}, {}
        return identity or f"run {self.made}"

    def init(self, **arguments):
        self.calls.append(("init", arguments))
        self.id = self.name = self._begin(arguments.get("id") or arguments.get("name"))
        return self

    def log(self, row, step):
        assert step not in self.rows
        self.rows[step] = row

    def finish(self):
        self.calls.append(("finish", dict(self.summary)))

    def start_run(self, **arguments):
        self.calls.append(("start_run", arguments))
        self.id = self._begin(arguments.get("run_id"))
        return SimpleNamespace(info=SimpleNamespace(run_id=self.id))

    def log_metrics(self, row, step, run_id):
        assert run_id == self.id
        self.log(row, step)

    def set_tag(self, name, value):
        self.summary[name] = value

    def end_run(self):
        self.finish()


LOGGERS = {
    "wandb": (mlopt.WandbLogger, {"project": "p"}, {"project": "p", "id": "run 1", "resume": "allow"}),
    "trackio": (mlopt.TrackioLogger, {"project": "p"}, {"project": "p", "name": "run 1", "resume": "allow"}),
    "mlflow": (mlopt.MLflowLogger, {"tags": {}}, {"tags": {}, "run_id": "run 1"}),
}


@pytest.fixture(params=list(LOGGERS))
def recorded(request, monkeypatch):
    """Give a stand-in for the module, and how its logger is made and resumed."""
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, request.param, recorder)
    kind, arguments, resumed = LOGGERS[request.param]
    return recorder, lambda: kind(**arguments), arguments, resumed


def plain(rows):
    """Return rows by step, as text: NaN is not equal to itself."""
    return {step: repr(row) for step, row in rows.items()}


@pytest.mark.parametrize("log_every", [1, 4, 20])
def test_every_row_is_sent_under_its_step(recorded, log_every):
    recorder, make, arguments, _ = recorded
    play(ROWS, make, log_every=log_every, status="enough")
    assert plain(recorder.rows) == {step: repr(row) for step, row in enumerate(ROWS, 1)}
    (_, given), (_, summary) = recorder.calls
    assert given == arguments
    assert summary in ({"status": "enough"}, {})


@pytest.mark.parametrize(("log_every", "first"), [(1, 7), (4, 5), (20, 1)])
def test_a_resumed_run_goes_on_in_the_trackers_run_with_the_first_row_that_was_not_sent(recorded, log_every, first):
    recorder, make, _, resumed = recorded
    play(ROWS, make, log_every=log_every, save_at=6, killed_at=8)
    assert recorder.calls[1][1] == resumed
    assert recorder.made == 1
    assert plain(recorder.rows) == {step: repr(row) for step, row in enumerate(ROWS, 1) if step >= first}


def test_another_run_is_another_run_of_the_tracker(recorded):
    recorder, make, arguments, _ = recorded
    logger = make()
    for count in (1, 2):
        play(ROWS, lambda: logger)
        assert len(recorder.rows) == len(ROWS)
        assert recorder.made == count
    assert recorder.calls[2][1] == arguments


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
    """Return what TensorBoard shows of a folder: for each name, values by step."""
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    events = accumulators.EventAccumulator(str(folder))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.mark.parametrize("log_every", [1, 2, 4, 20])
@pytest.mark.parametrize("killed_at", [6, 8])
def test_tensorboard_shows_a_resumed_run_as_an_uninterrupted_one(tmp_path, log_every, killed_at):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    play(ROWS, lambda: mlopt.TensorBoardLogger(tmp_path / "whole"), log_every=log_every)
    found = scalars(tmp_path / "whole")
    assert [step for step, _ in found["net/loss"]] == list(range(1, 10))
    assert [value for _, value in found["net/loss"]] == pytest.approx(
        [row["net/loss"] for row in ROWS], rel=1e-7, nan_ok=True
    )
    assert found["evaluation/m"] == [(5, math.inf)]
    assert set(found) == {"net/loss", "evaluation/m"}
    make = lambda: mlopt.TensorBoardLogger(tmp_path / "resumed")  # noqa: E731
    play(ROWS, make, log_every=log_every, save_at=6, killed_at=killed_at)
    assert repr(scalars(tmp_path / "resumed")) == repr(found)


def test_tensorboard_shows_the_steps_of_the_resumed_run_only(tmp_path):
    """Steps after the checkpoint had other values, and there were more of them."""
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    play([{"a": 1.0}] * 8, lambda: mlopt.TensorBoardLogger(tmp_path))
    state = {"id": "", "sent": 3}

    class Resumed(mlopt.TensorBoardLogger):
        def load_state_dict(self, saved):
            super().load_state_dict(state)

    # `play` begins a run of its own: only its second part is written to this folder, as the first one is to another.
    folders = iter([tmp_path / "other", tmp_path])
    play([{"a": 2.0}] * 5, lambda: Resumed(next(folders)), save_at=3, killed_at=3)
    assert scalars(tmp_path)["a"] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0)]


def test_mlflow_keeps_one_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow, which no extra installs")
    pytest.importorskip("sqlalchemy", reason="needs MLflow's store in SQLite")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    play(ROWS, lambda: mlopt.MLflowLogger(run_name="demo"), log_every=4, save_at=6, killed_at=7, status="enough")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs(["0"])
    assert (run.info.run_name, run.info.status, run.data.tags["status"]) == ("demo", "FINISHED", "enough")
    history = client.get_metric_history(run.info.run_id, "net/loss")
    found = {metric.step: metric.value for metric in history}
    assert len(history) == len(found) == len(ROWS)
    assert [found[k] for k in range(1, 10)] == pytest.approx([row["net/loss"] for row in ROWS], nan_ok=True)


def test_trackio_keeps_one_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = pytest.importorskip("trackio", reason="needs trackio, which no extra installs")
    play(ROWS, lambda: mlopt.TrackioLogger(project="demo"), log_every=4, save_at=6, killed_at=7)
    (run,) = trackio.Api().runs("demo")
    print(run.history())


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs wandb, which no extra installs")
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    monkeypatch.setenv("WANDB_MODE", "offline")
    play(ROWS, lambda: mlopt.WandbLogger(project="demo", dir=str(tmp_path)), log_every=4, save_at=6, killed_at=7)
    for file in sorted(tmp_path.rglob("*.wandb")):
        store = DataStore()
        store.open_for_scan(str(file))
        while (data := store.scan_data()) is not None:
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                print(
                    file.name, {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                )
