"""Callbacks; a run that was killed and resumed leaves the same files as an uninterrupted one."""

from __future__ import annotations

import csv
import errno
import json
import math
import struct
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from callback_cases import play
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import SGD

import mlopt
from mlopt.solving import History, write_csv

finite_or_not = st.floats(allow_nan=True, allow_infinity=True)
#: A level's loss at each step, and sometimes an evaluation.
drawn_rows = st.lists(
    st.fixed_dictionaries(
        {"net/loss": finite_or_not}, optional={"evaluation/a,b": finite_or_not, "net/é": finite_or_not}
    ),
    min_size=2,
    max_size=12,
)


def losses(*values, key="net/loss"):
    return [{key: value} for value in values]


def stopped(rows, metric, patience, **arguments):
    """Return the step at which early stopping ended the run; 0 if it did not."""
    names = ("greater_is_better", "min_delta")
    own = {name: arguments.pop(name) for name in names if name in arguments}
    run = play(rows, lambda: mlopt.EarlyStopping(metric, patience, **own), **arguments)
    return 0 if run.status == "completed" else run.step


def same_bits(first, second):
    return struct.pack("d", first) == struct.pack("d", second) or (math.isnan(first) and math.isnan(second))


# Early stopping


@pytest.mark.parametrize(
    ("values", "arguments", "step"),
    [
        ([3, 2, 1, 1, 1, 1], {}, 5),
        ([3, 2, 2, 1, 1, 0], {}, 0),
        ([1, 2, 3, 3, 3], {"greater_is_better": True}, 5),
        ([3, 2.8, 2.6, 2.4], {"min_delta": 0.5}, 3),
        # Measured from the best value, not from the previous one.
        ([3, 2.8, 2.4, 2.2, 2.0], {"min_delta": 0.5}, 5),
        # A decrease of exactly min_delta is not an improvement.
        ([3, 2.5, 2.5], {"min_delta": 0.5}, 3),
        ([math.nan, math.nan, 1], {}, 2),
        ([math.nan, 5, math.nan, 4, math.nan, math.nan], {}, 6),
        ([math.nan, 1, math.nan, math.nan], {"greater_is_better": True}, 4),
        ([math.inf, math.inf, 1], {}, 2),
        ([-math.inf, -math.inf, -math.inf, 1], {}, 3),
        ([1, math.inf, math.inf], {"greater_is_better": True, "min_delta": 0.1}, 0),
    ],
)
def test_early_stopping_ends_the_run_at_the_expected_step(values, arguments, step):
    assert stopped(losses(*values), "net/loss", 2, **arguments) == step
    evaluations = losses(*values, key="evaluation/m")
    assert stopped(evaluations, "evaluation/m", 2, **arguments) == step


def by_hand(values, patience, greater, delta):
    """Return the number of values seen before the run stops; 0 if it does not stop."""
    sign = -1 if greater else 1
    last = -1
    best = math.inf
    for i, value in enumerate(values):
        if not math.isnan(value) and best - sign * value > delta:
            best, last = sign * value, i
        if i - last >= patience:
            return i + 1
    return 0


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.sampled_from([math.nan, 0.0, 1.0, 1.25, 2.0, 3.0]), min_size=1, max_size=15),
    patience=st.integers(1, 4),
    greater=st.booleans(),
    delta=st.sampled_from([0.0, 0.5]),
    gap=st.integers(1, 3),
)
def test_each_evaluation_is_judged_once_whatever_the_number_of_steps_between(values, patience, greater, delta, gap):
    rows = [{"net/loss": 0.0} for _ in range(gap * len(values))]
    for i, value in enumerate(values):
        rows[gap * (i + 1) - 1]["evaluation/m"] = value
    step = stopped(rows, "evaluation/m", patience, greater_is_better=greater, min_delta=delta, log_every=4)
    assert step == gap * by_hand(values, patience, greater, delta)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.sampled_from([math.nan, 1.0, 2.0, 3.0]), min_size=4, max_size=16),
    patience=st.integers(1, 5),
    log_every=st.integers(1, 4),
    key=st.sampled_from(["net/loss", "evaluation/m"]),
    data=st.data(),
)
def test_a_resumed_run_stops_at_the_same_step(values, patience, log_every, key, data):
    rows = losses(*values, key=key)
    whole = stopped(rows, key, patience, log_every=log_every)
    last = (whole or len(rows)) - 1
    if last:
        save_at = data.draw(st.integers(1, last), label="save_at")
        killed_at = data.draw(st.integers(save_at, last), label="killed_at")
        assert stopped(rows, key, patience, log_every=log_every, save_at=save_at, killed_at=killed_at) == whole


def test_rows_are_judged_when_they_are_logged():
    assert stopped(losses(1, 1, 1, 1, 1, 1, 1, 1), "net/loss", 2, log_every=4) == 4


def test_the_status_names_the_metric_and_its_best_value():
    run = play(losses(3, 2, 2, 2), lambda: mlopt.EarlyStopping("net/loss", 2))
    assert run.status == "early stopping: net/loss was no better than 2, of step 2, in 2 rows"
    run = play(losses(math.nan, math.nan, key="evaluation/m"), lambda: mlopt.EarlyStopping("evaluation/m", 2))
    assert run.status == "early stopping: evaluation/m was not finite in 2 evaluations"
    # An evaluation before the first step.
    watch = mlopt.EarlyStopping("evaluation/m", 1)
    run = SimpleNamespace(step=0, status=None, stop=lambda reason: setattr(run, "status", reason))
    watch.on_evaluate(run, {"m": 2.0})
    watch.on_evaluate(run, {"m": 2.0})
    assert run.status == "early stopping: evaluation/m was no better than 2, of step 0, in 1 evaluations"


def test_a_missing_metric_is_reported_with_the_existing_ones():
    with pytest.warns(UserWarning, match=r"metric='accuracy' was never logged.*step, net/loss, evaluation/accuracy"):
        play([{"net/loss": 1.0, "evaluation/accuracy": 0.5}], lambda: mlopt.EarlyStopping("accuracy", 1))


def test_early_stopping_starts_again_with_another_run():
    watch = mlopt.EarlyStopping("net/loss", 2)
    assert play(losses(1, 1, 1), lambda: watch).step == 3
    assert play(losses(5, 5, 5, 5), lambda: watch).step == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"patience": 0}, r"patience=0; it must be a whole number >= 1"),
        ({"patience": 1.5}, r"patience=1.5; it must be a whole number >= 1"),
        ({"patience": 1, "min_delta": -0.1}, r"min_delta=-0.1; it must be a finite number >= 0"),
    ],
)
def test_early_stopping_refuses_invalid_arguments(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        mlopt.EarlyStopping("net/loss", **arguments)


# Files


def read_csv(file):
    with open(file, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def read_jsonl(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@settings(max_examples=40, deadline=None)
@given(rows=drawn_rows, log_every=st.integers(1, 4), data=st.data())
@pytest.mark.parametrize("kind", [mlopt.CSVLogger, mlopt.JSONLLogger])
def test_files_hold_every_bit_and_resumed_runs_write_the_same_bytes(kind, rows, log_every, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    whole, resumed = folder / "whole", folder / "resumed"
    run = play(rows, lambda: kind(whole), log_every=log_every)
    written = read_csv(whole) if kind is mlopt.CSVLogger else read_jsonl(whole)
    assert len(written) == len(rows)
    for row, expected in zip(written, run.history, strict=True):
        present = {key: value for key, value in row.items() if value != ""}
        assert set(present) == set(expected)
        assert all(same_bits(float(present[key]), float(expected[key])) for key in expected)
    save_at = data.draw(st.integers(1, len(rows)), label="save_at")
    killed_at = data.draw(st.integers(save_at, len(rows)), label="killed_at")
    play(rows, lambda: kind(resumed), log_every=log_every, save_at=save_at, killed_at=killed_at)
    assert resumed.read_bytes() == whole.read_bytes()
    if kind is mlopt.CSVLogger:
        write_csv(run.history, resumed)
        assert resumed.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["resumed", "whole"]


def test_the_text_of_a_file(tmp_path):
    """Compare the text itself, so that a change of the format is noticed."""
    rows = [{"net/loss": 0.1}, {"net/loss": math.nan, "evaluation/m": -math.inf}, {"net/loss": 1e-30}]
    play(rows, lambda: mlopt.CSVLogger(tmp_path / "h.csv"))
    assert (tmp_path / "h.csv").read_text() == "step,net/loss,evaluation/m\n1,0.1,\n2,nan,-inf\n3,1e-30,\n"
    play(rows, lambda: mlopt.JSONLLogger(tmp_path / "h.jsonl"))
    assert (tmp_path / "h.jsonl").read_text() == (
        '{"step": 1, "net/loss": 0.1}\n'
        '{"step": 2, "net/loss": NaN, "evaluation/m": -Infinity}\n'
        '{"step": 3, "net/loss": 1e-30}\n'
    )


@pytest.mark.parametrize("kind", [mlopt.CSVLogger, mlopt.JSONLLogger])
def test_numbers_of_numpy_and_torch_are_written_with_all_their_digits(kind, tmp_path):
    tenth = float(np.float32(0.1))
    play([{"a": np.float32(0.1), "b": torch.tensor(0.1), "c": np.int64(3)}], lambda: kind(tmp_path / "file"))
    assert f"{tenth!r}" != "0.1"
    assert (tmp_path / "file").read_text().count(f"{tenth!r}") == 2
    assert "3.0" not in (tmp_path / "file").read_text()


@pytest.mark.parametrize("kind", [mlopt.CSVLogger, mlopt.JSONLLogger])
def test_rows_are_in_the_file_after_each_log_and_after_an_error(kind, tmp_path):
    counts = []

    class Count(kind):
        def on_log(self, run, rows):
            super().on_log(run, rows)
            counts.append(self.file.read_text().count("net/loss" if kind is mlopt.JSONLLogger else "\n"))

    head = 1 if kind is mlopt.CSVLogger else 0
    play(losses(*range(5)), lambda: Count(tmp_path / "deeper" / "file"), log_every=2)
    assert counts == [head + 2, head + 4, head + 5]

    def loss(own, batch):
        return own().log().sum()

    # The first step sets x = 0, so the second loss is not finite: there are two rows, and neither was logged.
    level = mlopt.Level("x", mlopt.variables(torch.ones(1)), loss, optimizer=partial(SGD, lr=1.0))
    logger = kind(tmp_path / "file")
    logger.on_log = lambda run, rows: None
    with pytest.raises(mlopt.NonFiniteError):
        mlopt.solve(mlopt.Problem(level), 5, callbacks=[logger], progress=False)
    assert logger.file.read_text().count("\n") == head + 2


@pytest.mark.parametrize("kind", [mlopt.CSVLogger, mlopt.JSONLLogger])
def test_a_file_that_cannot_be_written_is_named(kind, tmp_path):
    (tmp_path / "text").write_text("no folder")
    with pytest.raises(OSError, match=r"text/file"):
        play(losses(1), lambda: kind(tmp_path / "text" / "file"))
    assert (tmp_path / "text").read_text() == "no folder"

    class Full(kind):
        def on_train_begin(self, run):
            super().on_train_begin(run)
            self._names = ("step", "net/loss")
            self.file.unlink()
            self.file.symlink_to("/dev/full")

    with pytest.raises(OSError, match="full disk") as caught:
        play(losses(1), lambda: Full(tmp_path / "full disk"))
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("failing", ["os.fsync", "os.replace"])
def test_a_file_is_replaced_completely_or_not_at_all(tmp_path, monkeypatch, failing):
    history = History()
    history.append({"step": 1, "a": 1.0})
    file = tmp_path / "history.csv"
    write_csv(history, file)
    before = file.read_bytes()
    history.append({"step": 2, "b": 2.0})

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match=r"history\.csv"):
        write_csv(history, file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["history.csv"]


def test_a_solved_problem_leaves_its_history_in_both_files(tmp_path):
    def loss(own, batch):
        return {"loss": own().square().sum(), "x": own()}

    level = mlopt.Level("x", mlopt.variables(torch.full((1,), 0.7)), loss, optimizer=partial(SGD, lr=0.1))
    loggers = [mlopt.CSVLogger(tmp_path / "h.csv"), mlopt.JSONLLogger(tmp_path / "h.jsonl")]
    solution = mlopt.solve(mlopt.Problem(level), 4, callbacks=loggers, progress=False)
    rows = list(solution.history)
    assert len(rows) == 4
    assert read_jsonl(tmp_path / "h.jsonl") == rows
    assert [{key: float(text) for key, text in row.items()} for row in read_csv(tmp_path / "h.csv")] == rows


def test_an_empty_history_is_an_empty_file(tmp_path):
    write_csv(History(), tmp_path / "history.csv")
    assert (tmp_path / "history.csv").read_bytes() == b""
