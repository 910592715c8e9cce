"""Several columns of labels for texts: losses, scores, predictions, and the whole command, with missing labels."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_cases import Case, load, succeed
from sklearn.metrics import average_precision_score, mean_absolute_error, r2_score, roc_auc_score
from text_cases import encoder, sentences, tapweight
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mlopt import cli
from mlopt.recipes.tapweight.files import DataError
from mlopt.recipes.tapweight.text import MultiTextTask, Predictor, TextTask, read_table
from mlopt.recipes.tapweight.text.data import Texts
from mlopt.recipes.tapweight.text.splitting import divided, meanings

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES, NUMBERS = ["kind", "long"], ["words", "letters"]


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """Return texts with two columns of classes and two of numbers; some cells are empty, and one is named "?"."""
    made = []
    for k, (text, label) in enumerate(sentences(count, seed)):
        words = text.split()
        cells = {
            "kind": "yes" if label == "kind" else "no",
            "long": "" if k % 5 == 3 else str(int(len(words) > 8)),
            "words": str(len(words) / 2),
            "letters": "?" if k % 7 == 2 else str(len(text)),
        }
        made.append({"text": text, **cells})
    return made


def written(file: Path, count: int = 40, seed: int = 0) -> Path:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["text", *CLASSES, *NUMBERS])
        writer.writeheader()
        writer.writerows(rows(count, seed))
    return file


def read(file: Path, labels: list[str]) -> Texts:
    return read_table(file, label=labels, missing=["?"])


def of_files(folder: Path, labels: list[str], **options: Any) -> MultiTextTask:
    parts = {
        split: read(written(folder / f"{split}.csv", 40, seed), labels)
        for seed, split in enumerate(("train", "valid", "test"))
    }
    return MultiTextTask(parts, encoder().collate, **options)


def test_the_loss_is_the_mean_over_the_labels_that_are_there(tmp_path: Path) -> None:
    classes, numbers = of_files(tmp_path, CLASSES), of_files(tmp_path, NUMBERS)
    outputs = torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = rows(40, 0)
    expected = []
    for row, logits in zip(table, outputs.tolist(), strict=True):
        signs = [(row["kind"] == "yes", logits[0])] + ([(row["long"] == "1", logits[1])] if row["long"] else [])
        expected.append(np.mean([math.log1p(math.exp(-x if positive else x)) for positive, x in signs]))
    batch = classes.collate(list(classes.splits["train"]))
    assert classes.losses(outputs, batch).tolist() == pytest.approx(expected, rel=1e-12)
    columns = {name: np.array([float(row[name].replace("?", "nan")) for row in table]) for name in NUMBERS}
    standard = np.stack([(x - np.nanmean(x)) / np.nanstd(x) for x in columns.values()], axis=1)
    assert np.isnan(standard).any()
    batch = numbers.collate(list(numbers.splits["train"]))
    errors = np.nanmean((outputs.numpy() - standard) ** 2, axis=1)
    assert numbers.losses(outputs, batch).tolist() == pytest.approx(errors, rel=1e-6)
    assert numbers.columns(batch).numpy() == pytest.approx(standard, rel=1e-5, abs=1e-5, nan_ok=True)


def test_the_score_is_the_mean_over_columns_as_in_scikit_learn(tmp_path: Path) -> None:
    made = of_files(tmp_path, CLASSES, metric="pr_auc")
    outputs = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    batch = made.collate(list(made.splits["test"]))
    metric = made.metric()
    metric.update(outputs, made.targets(batch))
    table = rows(40, 2)
    each = {}
    for k, name in enumerate(CLASSES):
        there = [i for i, row in enumerate(table) if row[name]]
        truth = [table[i][name] in ("yes", "1") for i in there]
        each[name] = average_precision_score(truth, outputs[there, k])
    assert float(metric.compute()) == pytest.approx(np.mean(list(each.values())), abs=1e-6)
    measures = made.measures(outputs, made.targets(batch))
    assert {name: own["pr_auc"] for name, own in measures.items()} == pytest.approx(each, abs=1e-6)


def test_a_run_on_columns_of_classes_from_the_file_to_transformers(
    text: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path / "train.csv")
    options = (
        f"--model {text.folder / 'model'} --train {file} --labels kind long --head classifier --ensemble 2 {text.fast}"
    )
    command = [*text.command, *options.split(), "--output", str(tmp_path / "run")]
    succeed([*command, "--plan"])
    plan = capsys.readouterr().out
    assert "Task: classification of kind, long, scored by roc_auc; texts: 32 train, 4 valid, 4 test" in plan
    assert "kind: two classes, no, yes; yes is the positive one" in plan
    succeed(command)
    with (tmp_path / "run" / "predictions.csv").open() as stream:
        predicted = list(csv.DictReader(stream))
    assert {row["kind"] for row in predicted} == {"yes", "no"}
    scores = load(tmp_path, "run", "scores.json")["predictor"]["test"]
    for name, positive in (("kind", "yes"), ("long", "1")):
        there = [row for row in predicted if row[name]]
        truth = [row[name] == positive for row in there]
        value = roc_auc_score(truth, [float(row[f"{name}_probability"]) for row in there])
        assert scores[name]["roc_auc"] == pytest.approx(value, abs=1e-6)
    # A plain script of transformers: the first of the two models.
    own, words = (
        kind.from_pretrained(tmp_path / "run" / "model") for kind in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    assert (own.config.problem_type, own.config.id2label) == ("multi_label_classification", {0: "kind", 1: "long"})
    inputs = [text for text, _ in sentences(3, 5)]
    with torch.no_grad():
        logits = own(**words(inputs, padding=True, return_tensors="pt")).logits.double()
    predictor = Predictor.load(tmp_path / "run")
    predictions = predictor.predict(inputs)
    first = Predictor(predictor.members[:1], predictor.target).predict(inputs)
    assert first.values == pytest.approx(logits.sigmoid().numpy(), rel=1e-6)
    assert predictions.spread is not None
    assert predictions.decisions == [
        (("no", "yes")[a >= 0.5], ("0", "1")[b >= 0.5]) for a, b in predictions.values.tolist()
    ]
    succeed(
        ["tapweight", "predict", str(tmp_path / "run"), "--input", str(file), "--output", str(tmp_path / "new.csv")]
    )
    header = (tmp_path / "new.csv").read_text().splitlines()[0].split(",")
    assert header[:5] == ["text", "kind_predicted", "long_predicted", "kind_probability", "long_probability"]
    succeed(["tapweight", "embed", str(tmp_path / "run"), "--input", str(file), "--output", str(tmp_path / "new.npy")])
    assert np.isfinite(np.load(tmp_path / "new.npy")).all()


def test_a_run_on_columns_of_numbers_predicts_in_their_units(tmp_path: Path) -> None:
    own = encoder()
    parts = {
        split: read(written(tmp_path / f"{split}.csv", 24, seed), NUMBERS)
        for seed, split in enumerate(("train", "valid", "test"))
    }
    task = MultiTextTask(parts, own.collate, head="classifier", metric="mae")
    assert (task.form, task.kind, task.greater_is_better) == ("numbers", "regression", False)
    result = tapweight(own, ("masked_tokens", "contrastive"), task=task).fit(1, methods=["direct"], progress=False)
    result.save(tmp_path / "run")
    with (tmp_path / "run" / "predictions.csv").open() as stream:
        predicted = list(csv.DictReader(stream))
    scores = load(tmp_path, "run", "scores.json")["predictor"]["test"]
    for name in NUMBERS:
        there = [row for row in predicted if row[name]]
        assert len(there) == (24 if name == "words" else 20)
        truth, values = ([float(row[column]) for row in there] for column in (name, f"{name}_predicted"))
        assert scores[name]["mae"] == pytest.approx(mean_absolute_error(truth, values), rel=1e-5)
        assert scores[name]["r2"] == pytest.approx(r2_score(truth, values), rel=1e-4)
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    words = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert (whole.config.problem_type, whole.config.num_labels) == ("regression", 2)
    inputs = [text for text, _ in sentences(3, 5)]
    with torch.no_grad():
        outputs = whole(**words(inputs, padding=True, return_tensors="pt")).logits.double().numpy()
    # By hand: the mean and the deviation of the training labels that are there.
    columns = [[float(row[name]) for row in rows(24, 0) if row[name] != "?"] for name in NUMBERS]
    expected = outputs * [np.std(x) for x in columns] + [np.mean(x) for x in columns]
    assert result.predict(inputs).values == pytest.approx(expected, rel=1e-5)
    assert np.array_equal(Predictor.load(tmp_path / "run").predict(inputs).values, result.predict(inputs).values)


def test_each_combination_of_classes_has_its_share_of_each_split(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w") as file:
        file.writelines(["text,a,b\n", *(f"text {k},{k % 2},{k // 2 % 2}\n" for k in range(80))])
    texts = read_table(tmp_path / "a.csv", label=["a", "b"])
    splits = divided(texts, meanings(texts))
    for indices in splits.values():
        shares = [sum(texts.cells()[i] == (a, b) for i in indices) for a in "01" for b in "01"]
        assert shares == [len(indices) // 4] * 4


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (
            "kind words",
            "the columns cannot be predicted together (kind: two classes, no, yes; yes is the positive one; ",
        ),
        ("kind kind", "labels=['kind', 'kind'] must be different columns, not those of the text; correct --labels"),
        ("kind text", "must be different columns, not those of the text; correct --labels"),
        ("kind lnog", "no column 'lnog'"),
        ("", "--labels has no value; give at least one after it"),
    ],
)
def test_columns_that_do_not_go_together_are_refused(
    labels: str, sentence: str, text: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path / "train.csv")
    options = (
        f"--model {text.folder / 'model'} --train {file} --labels {labels} {text.fast} --output {tmp_path / 'run'}"
    )
    assert cli.main([*text.command, *options.split()]) == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert "--labels" in message


def test_faults_of_the_cells_and_of_the_splits(tmp_path: Path) -> None:
    good = read(written(tmp_path / "good.csv"), CLASSES)
    with pytest.raises(DataError, match=r"the labels are kind, long; MultiTextTask takes several"):
        TextTask(dict.fromkeys(("train", "valid", "test"), good), encoder().collate)
    (tmp_path / "bad.csv").write_text("text,kind,long\na,yes,0\nb,maybe,1\n")
    bad = read(tmp_path / "bad.csv", CLASSES)
    with pytest.raises(DataError, match=r"bad\.csv, row 3, column 'kind': 'maybe' is not one of the classes, no, yes;"):
        MultiTextTask({"train": good, "valid": bad, "test": good}, encoder().collate)
    (tmp_path / "few.csv").write_text("text,kind,long\na,yes,\nb,no,\n")
    few = read(tmp_path / "few.csv", CLASSES)
    with pytest.raises(
        DataError, match=r"task 'long' has no label in the test split; leave it out with --labels, or give"
    ):
        MultiTextTask({"train": good, "valid": good, "test": few}, encoder().collate)
    other = read(tmp_path / "few.csv", ["kind"])
    with pytest.raises(
        DataError, match=r"few\.csv: the labels are kind, but those of .*good\.csv are kind, long; give the"
    ):
        MultiTextTask({"train": good, "valid": other, "test": good}, encoder().collate)


def test_names_of_columns_may_differ_in_case(tmp_path: Path) -> None:
    good = read(written(tmp_path / "good.csv"), CLASSES)
    (tmp_path / "case.csv").write_text((tmp_path / "good.csv").read_text().replace("text,kind,long", "Text,Kind,LONG"))
    task = MultiTextTask(
        {"train": good, "valid": read(tmp_path / "case.csv", CLASSES), "test": good}, encoder().collate
    )
    assert task.label_names == ("kind", "long")


def test_a_split_with_one_label_is_reported_by_its_name(tmp_path: Path) -> None:
    good = {names[0]: read(written(tmp_path / "good.csv"), names) for names in (CLASSES, NUMBERS)}
    (tmp_path / "few.csv").write_text("text,kind,long,words,letters\na,yes,0,2,3\nb,yes,1,2,4\n")
    classes, numbers = read(tmp_path / "few.csv", CLASSES), read(tmp_path / "few.csv", NUMBERS)
    splits = {"train": good["kind"], "valid": good["kind"], "test": classes}
    remarks = MultiTextTask(splits, encoder().collate).remarks
    assert "task 'kind' has only the label yes in the test split, and is left out of its roc_auc" in remarks
    splits = {"train": good["words"], "valid": numbers, "test": good["words"]}
    remarks = MultiTextTask(splits, encoder().collate, metric="r2").remarks
    assert "task 'words' has only the label 2 in the valid split, and is left out of its r2" in remarks


def test_columns_of_predictions_have_different_names(tmp_path: Path) -> None:
    """Labels may be called as columns of the file of predictions are."""
    table = (written(tmp_path / "a.csv", 24)).read_text().replace("text,kind,long", "text,row,row_predicted")
    (tmp_path / "a.csv").write_text(table)
    texts, own = read(tmp_path / "a.csv", ["row", "row_predicted"]), encoder()
    task = MultiTextTask(dict.fromkeys(("train", "valid", "test"), texts), own.collate)
    result = tapweight(own, ("masked_tokens", "contrastive"), task=task).fit(1, methods=["direct"], progress=False)
    result.save(tmp_path / "run")
    header = (tmp_path / "run" / "predictions.csv").read_text().splitlines()[0].split(",")
    assert header == [
        *("row", "text", "row_2", "row_predicted", "row_predicted_2", "row_predicted_predicted"),
        *("row_probability", "row_predicted_probability"),
    ]
    assert read_table(tmp_path / "run" / "predictions.csv", label=["row_2", "row_predicted"]).cells() == [
        (a, b) for a, b in texts.cells()
    ]


def test_a_row_without_any_label_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,a,b\none,1,0\ntwo,,?\nthree,,1\n")
    texts = read_table(tmp_path / "a.csv", label=["a", "b"], missing=["?"])
    assert texts.cells() == [("1", "0"), (None, "1")]
    assert [(each.row, each.reason) for each in texts.skipped] == [(3, "the label is missing")]
