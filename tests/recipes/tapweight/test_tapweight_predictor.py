"""The predictor of a finished run of each modality: its files, its commands, and tasks that define none."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from command_cases import Case, load, merged, succeed
from sklearn.metrics import accuracy_score
from tapweight_cases import recipe

from mlopt import cli
from mlopt.errors import ArgumentError
from mlopt.recipes.tapweight.metrics import measures_of
from mlopt.recipes.tapweight.prediction import load as load_predictor
from mlopt.recipes.tapweight.predictions import Target

pytestmark = pytest.mark.usefixtures("one_thread")


def rows_of(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def inputs(case: Case, tmp_path: Path) -> tuple[Path, str, list[str]]:
    """Return a file with a bad row among two others of the test split, the name of its column, and the reason."""
    tested = rows_of(case.finished() / "predictions.csv")
    column = "smiles" if case.name == "molecules" else "text"
    contents = [tested[0][column], "C1CC" if case.name == "molecules" else " ", tested[1][column]]
    with open(tmp_path / "new.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([["name", column], *enumerate(contents)])
    return tmp_path / "new.csv", column, contents


def test_the_commands_keep_every_row_in_place(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, column, contents = inputs(case, tmp_path)
    finished = case.finished()
    predictor = load_predictor(finished)
    common = [str(finished), "--input", str(file), "--device", "cpu"]
    succeed(["tapweight", "predict", *common, "--output", str(tmp_path / "new" / "p.csv")])
    reason = "not valid SMILES" if case.name == "molecules" else "the text is empty"
    assert (
        f"3 rows in {tmp_path}/new/p.csv; 1 cannot be used, the first: record 2 ({reason})." in capsys.readouterr().out
    )
    predictions = predictor.predict(contents)
    for row, content, cells, fault in zip(
        rows_of(tmp_path / "new" / "p.csv"), contents, predictions.cells, ("", reason, ""), strict=True
    ):
        assert row == {column: content, **dict(zip(predictions.header, cells, strict=True)), "reason": fault}
    succeed(["tapweight", "embed", *common, "--output", str(tmp_path / "e.npy")])
    succeed(["tapweight", "embed", *common, "--output", str(tmp_path / "e.csv")])
    features = np.load(tmp_path / "e.npy")
    assert np.array_equal(features, predictor.embed(contents), equal_nan=True)
    assert np.isfinite(features).all(1).tolist() == [True, False, True]
    for row, own, fault in zip(rows_of(tmp_path / "e.csv"), features, ("", reason, ""), strict=True):
        assert row["reason"] == fault
        cells = [row[f"feature_{k}"] for k in range(len(own))]
        assert cells == ([""] * len(own) if fault else [repr(float(x)) for x in own])


def test_a_run_saves_the_predictions_for_its_test_split(case: Case) -> None:
    finished = case.finished()
    tested, predictor = rows_of(finished / "predictions.csv"), load_predictor(finished)
    again = predictor.predict([row[predictor.columns[0]] for row in tested])
    for row, cells in zip(tested, again.cells, strict=True):
        assert [row[name] for name in again.header] == cells
    scores = load(finished, "scores.json")
    (score,) = scores["predictor"]["test"].values()
    (measures,) = scores["test_measures"]["tapweight"].values()
    assert score == pytest.approx(measures, abs=1e-6)
    assert score[case.metric] == pytest.approx(scores["scores"]["tapweight"]["test"], abs=1e-6)


def test_a_run_takes_the_splits_of_another(case: Case) -> None:
    train = str(case.folder / "train.jsonl" if case.name == "text" else case.folder / "train.csv")
    data = ["--model", str(case.folder / "model")] if case.name == "text" else case.files[:2] + case.files[4:]
    runs = {"first": ["--seed", "1"], "other": ["--seed", "2"]}
    runs["again"] = ["--seed", "2", "--splits", str(case.folder / "first" / "splits.json")]
    for output, more in runs.items():
        size = case.fast.replace("--split random ", "") if output == "again" else case.fast
        options = [*data, "--train", train, *size.split(), "--epochs", "1", *more]
        succeed([*case.command, *merged([*options, "--output", str(case.folder / output)])])
    first, other, again = (load(case.folder, output, "splits.json") for output in runs)
    assert first == again != other
    assert sorted(record for records in first.values() for record in records) == list(range(40))
    lines = Path(train).read_text().splitlines()[case.name == "molecules" :]
    contents = [
        row["smiles" if case.name == "molecules" else "text"]
        for row in rows_of(case.folder / "again" / "predictions.csv")
    ]
    for record, content in zip(first["test"], contents, strict=True):
        assert content in lines[record]


def test_splits_of_three_files_are_not_records_of_one(text: Case) -> None:
    assert not (text.finished() / "splits.json").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["predict", "nowhere"], "nowhere holds no predictor; give the folder of a run's result"),
        (["predict", "finished", "--output", "a.txt"], "output='a.txt'; give a name that ends in .csv"),
        (["embed", "finished", "--output", "a.txt"], "output='a.txt'; give a name that ends in .npy or .csv"),
        (["predict", "finished", "--columns", "a", "b"], "--columns names 2 columns; the predictor takes 1"),
        (["predict", "finished", "--columns", "molecule"], "no column 'molecule'"),
        (["predict", "finished", "--columns", "molecule"], "with --columns"),
        (["predict", "finished", "--input", "nothing.csv"], "nothing.csv: no such file"),
    ],
)
def test_what_cannot_be_predicted_is_refused(
    arguments: list[str],
    sentence: str,
    case: Case,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, _, _ = inputs(case, tmp_path)
    monkeypatch.chdir(case.folder)
    command, folder, *more = arguments
    options = merged(["--input", str(file), "--output", str(tmp_path / "a.csv"), *more])
    assert cli.main(["tapweight", command, folder, *options]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "a.csv").exists()


def test_the_input_is_not_replaced(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, _, _ = inputs(case, tmp_path)
    before, same = file.read_bytes(), str(tmp_path / "x" / ".." / file.name)
    assert cli.main(["tapweight", "predict", str(case.finished()), "--input", str(file), "--output", same]) == 2
    assert f"--output={same!r} would overwrite the input; give another name" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_a_probability_at_the_threshold_is_scored_as_it_is_written() -> None:
    target = Target.binary(["y"])
    values = torch.tensor([[0.5], [0.5], [0.75]], dtype=torch.float64)
    predicted = [target.decided(row)[0] for row in values.numpy()]
    assert predicted == ["0", "0", "1"]
    scores = measures_of("binary", target.scored(values)[:, 0], torch.tensor([1.0, 0.0, 1.0]))
    assert scores["accuracy"] == pytest.approx(accuracy_score([1, 0, 1], [int(name) for name in predicted]))


def test_a_folder_with_another_model_is_refused_before_the_run(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    own = case.folder / "own" / "model"
    own.mkdir(parents=True)
    (own / "model.safetensors").write_text("of a user")
    assert cli.main(case.options("own")) == 2
    assert f"{own} holds files that are not a predictor; give another folder, or move them" in capsys.readouterr().err
    assert (own / "model.safetensors").read_text() == "of a user"
    assert [path.name for path in own.parent.iterdir()] == ["model"]  # no phase has begun


def test_a_task_without_a_predictor_runs_and_is_saved_without_one(tmp_path: Path) -> None:
    result = recipe().fit(2, methods=["direct"], progress=False)
    result.save(tmp_path)
    assert not {"model", "predictions.csv", "splits.json"} & {path.name for path in tmp_path.iterdir()}
    with pytest.raises(ArgumentError, match=r"the task of this run defines no predictor; override Task\.predictor"):
        result.predict([1.0])
