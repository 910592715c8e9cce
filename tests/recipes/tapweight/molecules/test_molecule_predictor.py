"""The predictor of a run on molecules: loaded again, scores of each label, ensembles, weights of classes."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from command_cases import SMILES
from sklearn.metrics import r2_score, roc_auc_score, root_mean_squared_error
from sklearn.utils.class_weight import compute_class_weight
from torch.nn.functional import binary_cross_entropy_with_logits

from mlopt.errors import ArgumentError
from mlopt.recipes import TapWeight
from mlopt.recipes.tapweight.files import DataError
from mlopt.recipes.tapweight.molecules import GINE, MoleculeTask, Predictor, make_objective, read_corpus
from mlopt.recipes.tapweight.molecules.graphs import graph_of
from mlopt.recipes.tapweight.settings import Settings

SETTINGS = Settings(batch_size=8, epochs=2, measurements=2)
MIXED = ["CCO", "C1CC", "", None, "c1ccccc1N", "C(C)(C)(C)(C)C"]


def table(folder: Path, columns: dict[str, list[Any]]) -> Path:
    with open(folder / "train.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["smiles", *columns])
        writer.writerows(zip(SMILES, *columns.values(), strict=True))
    return folder / "train.csv"


def recipe(file: Path, settings: Settings = SETTINGS, **options: Any) -> TapWeight:
    torch.manual_seed(0)
    task = MoleculeTask.from_csv(file, split="random", **options)
    objectives = [make_objective("masked_atoms"), make_objective("contrastive")]
    return TapWeight(GINE(width=8, layers=2), objectives, task, read_corpus(file), settings=settings)


def written(file: Path) -> dict[str, tuple[str, ...]]:
    with open(file, newline="") as stream:
        header, *rows = csv.reader(stream)
    return dict(zip(header, zip(*rows, strict=True), strict=True))


def twelve_tasks(folder: Path) -> Path:
    """Write 12 binary tasks, of whose labels a third are missing; the last has only the class 0."""
    draw = random.Random(3)
    columns = {f"task{k}": [draw.choice(("0", "1", "")) for _ in SMILES] for k in range(11)}
    return table(folder, {**columns, "task11": [draw.choice(("0", "")) for _ in SMILES]})


def test_scores_of_12_tasks_with_missing_labels_are_those_of_the_written_predictions(tmp_path: Path) -> None:
    own = recipe(twelve_tasks(tmp_path))
    result = own.fit(1, methods=["direct"], progress=False)
    result.save(tmp_path / "run")
    columns, scores = (
        written(tmp_path / "run" / "predictions.csv"),
        json.loads((tmp_path / "run" / "scores.json").read_text()),
    )
    defined = []
    for name, score in scores["predictor"]["test"].items():
        present = [k for k, label in enumerate(columns[name]) if label]
        labels = [int(columns[name][k]) for k in present]
        probabilities = [float(columns[f"{name}_probability"][k]) for k in present]
        assert [columns[f"{name}_predicted"][k] for k in present] == [str(int(p >= 0.5)) for p in probabilities]
        if len(set(labels)) < 2:
            assert "roc_auc" not in score
        else:
            assert score["roc_auc"] == pytest.approx(roc_auc_score(labels, probabilities), abs=1e-6)
            defined.append(score["roc_auc"])
    assert list(scores["predictor"]["test"]) == [f"task{k}" for k in range(12)]
    assert len(defined) < 12
    assert np.mean(defined) == pytest.approx(scores["scores"]["direct"]["test"], abs=1e-6)


def test_the_score_of_a_regression_is_that_of_the_written_predictions_and_its_rows_are_those_of_the_file(
    tmp_path: Path,
) -> None:
    file = table(tmp_path, {"length": [len(smiles) / 10 for smiles in SMILES]})
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:3], "C1CC,0.4", "", *lines[3:]]) + "\n")  # a bad row and an empty line
    result = recipe(file).fit(1, methods=["direct"], progress=False)
    result.save(tmp_path / "run")
    columns, scores = (
        written(tmp_path / "run" / "predictions.csv"),
        json.loads((tmp_path / "run" / "scores.json").read_text()),
    )
    labels, predicted = ([float(cell) for cell in columns[name]] for name in ("length", "length_predicted"))
    assert scores["predictor"]["models"] == 1
    measured = scores["predictor"]["test"]["length"]
    assert measured["rmse"] == pytest.approx(root_mean_squared_error(labels, predicted), rel=1e-6)
    assert measured["r2"] == pytest.approx(r2_score(labels, predicted), rel=1e-5)
    lines = file.read_text().splitlines()
    for row, smiles, label in zip(columns["row"], columns["smiles"], columns["length"], strict=True):
        assert lines[int(row) - 1] == f"{smiles},{label}"
    splits, records = json.loads((tmp_path / "run" / "splits.json").read_text()), [line for line in lines[1:] if line]
    assert [records[k] for k in splits["test"]] == [
        f"{smiles},{label}" for smiles, label in zip(columns["smiles"], columns["length"], strict=True)
    ]
    assert sorted(record for records in splits.values() for record in records) == [0, 1, *range(3, 41)]


def test_a_loaded_predictor_predicts_the_same_and_bad_rows_stay_in_place(tmp_path: Path) -> None:
    result = recipe(twelve_tasks(tmp_path)).fit(1, methods=["direct"], progress=False)
    result.save(tmp_path / "run")
    loaded = Predictor.load(tmp_path / "run")
    columns = written(tmp_path / "run" / "predictions.csv")
    again = loaded.predict(columns["smiles"])
    assert [tuple(row) for row in again.cells] == list(zip(*(columns[name] for name in again.header), strict=True))
    mixed, own = loaded.predict(MIXED), result.predict(MIXED)
    assert np.array_equal(mixed.values, own.values, equal_nan=True)
    assert np.isfinite(mixed.values).all(1).tolist() == [True, False, False, False, True, False]
    assert mixed.reasons[:4] == ("", "not valid SMILES", "the SMILES is empty", "None is not text")
    assert "Explicit valence for atom # 0 C, 5, is greater than permitted" in mixed.reasons[5]
    assert mixed.cells[1] == [""] * 24
    assert mixed.decisions[1] == ("",) * 12
    assert mixed.decisions[0] == tuple(str(int(p >= 0.5)) for p in mixed.values[0])
    assert np.array_equal(loaded.embed(MIXED), result.embed(MIXED), equal_nan=True)
    several = loaded.predict(MIXED * 60)  # more than a batch
    assert several.reasons == mixed.reasons * 60
    np.testing.assert_allclose(several.values, np.tile(mixed.values, (60, 1)), rtol=1e-5)
    broken = loaded.predict(["C1CC"])
    assert np.isnan(broken.values).all()
    assert np.isnan(loaded.embed(["C1CC"])).all()


def test_an_ensemble_predicts_the_mean_and_the_spread_of_finetunings_on_one_encoder(tmp_path: Path) -> None:
    file = table(tmp_path, {"length": [len(smiles) / 10 for smiles in SMILES]})
    own = recipe(file, attrs.evolve(SETTINGS, ensemble=3))
    result = own.fit(2, methods=["direct", "equal"], progress=False)
    single = recipe(file).fit(2, methods=["direct", "equal"], progress=False)
    # The ensemble leaves the comparison of the methods alone.
    assert result.scores == single.scores
    score = result.tested.scores["length"]["rmse"]
    titles, _, tests, _ = (list(column.cells) for column in result.tables()[-1].columns)
    assert (titles[-1], tests[-1]) == ("equal weights, mean of 3 models", f"{score:.3f}")
    result.save(tmp_path / "run")
    loaded = Predictor.load(tmp_path / "run")
    graphs = own.task.collate([graph_of(MIXED[0]), graph_of(MIXED[4])])
    mean, std = own.task.mean.item(), own.task.std.item()
    with torch.no_grad():
        members = [
            own.task.outputs(run.model.encoder.eval(), run.model.head.eval(), graphs).double().numpy() * std + mean
            for run in result.finetuned
        ]
    assert len({member.tobytes() for member in members}) == len(members) == 3
    for predictions in (result.predict(MIXED), loaded.predict(MIXED)):
        assert predictions.header == ["length_predicted", "length_spread"]
        assert predictions.values[[0, 4]] == pytest.approx(np.mean(members, axis=0), rel=1e-12)
        assert predictions.spread[[0, 4]] == pytest.approx(np.std(members, axis=0, ddof=1), rel=1e-9)
        assert np.isnan(predictions.spread[[1, 2, 3, 5]]).all()
    with torch.no_grad():
        features = result.finetuned[0].model.encoder.pool(graphs).double().numpy()
    assert np.array_equal(loaded.embed(MIXED)[[0, 4]], features)


def test_whoever_may_read_the_folder_may_read_its_tensors(tmp_path: Path) -> None:
    file = table(tmp_path, {"length": [len(smiles) / 10 for smiles in SMILES]})
    result = recipe(file, attrs.evolve(SETTINGS, ensemble=2, epochs=1)).fit(1, methods=["direct"], progress=False)
    result.save(tmp_path / "run")
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".safetensors"]) == 5  # two members, and the adapted encoder
    assert len({path.stat().st_mode for path in (file, *files)}) == 1


def test_a_predictor_replaces_an_earlier_one_and_nothing_else(tmp_path: Path) -> None:
    file = table(tmp_path, {"length": [len(smiles) / 10 for smiles in SMILES]})
    large = recipe(file, attrs.evolve(SETTINGS, ensemble=3, epochs=1)).fit(1, methods=["direct"], progress=False)
    small = recipe(file, attrs.evolve(SETTINGS, epochs=1)).fit(1, methods=["direct"], progress=False)
    large.predictor.save(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").glob("member-*")) == ["member-2", "member-3"]
    small.predictor.save(tmp_path / "model")
    assert not list((tmp_path / "model").glob("member-*"))
    assert len(Predictor.load(tmp_path / "model").members) == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(DataError, match="mine holds files that are not a predictor; give another folder"):
        small.predictor.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    with pytest.raises(ArgumentError, match="contents='CCO'; give a sequence with at least one entry"):
        small.predict("CCO")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": "other"}, 'does not describe a predictor: it lacks "format": "mlopt-predictor"'),
        ({"version": 2}, "has version 2, but this release reads version 1"),
        ({"modality": "text"}, "holds a predictor of text, not of molecules"),
    ],
)
def test_a_folder_without_this_kind_of_predictor_is_refused(
    change: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    content = {"format": "mlopt-predictor", "version": 1, "modality": "molecules", "members": 1, **change}
    with pytest.raises(DataError, match="holds no predictor; give the folder of a run's result"):
        Predictor.load(tmp_path)
    (tmp_path / "seed-4" / "model").mkdir(parents=True)
    (tmp_path / "seed-4" / "model" / "predictor.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"holds no predictor; give .*seed-4$"):
        Predictor.load(tmp_path)
    with pytest.raises(DataError, match=sentence):
        Predictor.load(tmp_path / "seed-4")


def test_a_predictor_that_is_damaged_is_refused_with_a_remedy(tmp_path: Path) -> None:
    file = table(tmp_path, {"length": [len(smiles) / 10 for smiles in SMILES]})
    recipe(file, attrs.evolve(SETTINGS, epochs=1)).fit(1, methods=["direct"], progress=False).predictor.save(
        tmp_path / "model"
    )
    files = {name: tmp_path / "model" / f"{name}.safetensors" for name in ("head", "model")}
    described = tmp_path / "model" / "predictor.json"
    whole = {place: place.read_bytes() for place in (*files.values(), described)}
    target = json.loads(whole[described])["target"]
    damages = [(place, content[:50]) for place, content in whole.items() if place != described]
    for changed in ({}, {"target": {**target, "mean": []}}, {"target": {**target, "other": 1}}):
        content = {name: value for name, value in json.loads(whole[described]).items() if name != "target"}
        damages.append((described, json.dumps({**content, **changed}).encode()))
    assert len(damages) == 5
    for place, content in damages:
        place.write_bytes(content)
        with pytest.raises(
            DataError, match=r"a file of the predictor is missing or damaged \(.*\); copy the whole folder"
        ):
            Predictor.load(tmp_path / "model")
        place.write_bytes(whole[place])
    files["head"].unlink()
    with pytest.raises(
        DataError, match=r"missing or damaged \(No such file.*head\.safetensors\); copy the whole folder"
    ):
        Predictor.load(tmp_path / "model")


def test_balanced_classes_weigh_as_in_scikit_learn_task_by_task(tmp_path: Path) -> None:
    file = twelve_tasks(tmp_path)
    plain, balanced = (MoleculeTask.from_csv(file, split="random", class_weights=way) for way in ("none", "balanced"))
    train = torch.cat([graph.y for graph in plain.splits["train"]])
    batch = plain.collate(list(plain.splits["train"]))
    outputs = torch.randn(*train.shape, dtype=torch.float64)
    expected = torch.zeros(len(train), dtype=torch.float64)
    for row, labels in enumerate(train):
        terms = []
        for k, label in enumerate(labels):
            if label.isnan():
                continue
            column = train[:, k][~train[:, k].isnan()].numpy()
            classes = np.unique(column)
            # A class that does not occur counts as one of the two all the same.
            weights = compute_class_weight("balanced", classes=classes, y=column) * len(classes) / 2
            weight = dict(zip(classes, weights, strict=True))[float(label)]
            terms.append(weight * binary_cross_entropy_with_logits(outputs[row, k], label.double()))
        expected[row] = sum(terms) / max(len(terms), 1)
    torch.testing.assert_close(balanced.losses(outputs, batch), expected, rtol=1e-6, atol=0)
    assert not torch.allclose(plain.losses(outputs, batch), expected)


def test_the_classes_of_a_column_are_predicted_by_name(tmp_path: Path) -> None:
    names = [("small", "medium", "large")[k % 3] for k, _ in enumerate(SMILES)]
    result = recipe(table(tmp_path, {"size": names})).fit(1, methods=["direct"], progress=False)
    result.save(tmp_path / "run")
    columns, rows = written(tmp_path / "run" / "predictions.csv"), (tmp_path / "train.csv").read_text().splitlines()
    assert [rows[int(row) - 1] for row in columns["row"]] == [
        f"{smiles},{label}" for smiles, label in zip(columns["smiles"], columns["size"], strict=True)
    ]
    probabilities = np.array([[float(p) for p in columns[f"{name}_probability"]] for name in sorted(set(names))])
    assert probabilities.sum(0) == pytest.approx(1)
    assert list(json.loads((tmp_path / "run" / "scores.json").read_text())["predictor"]["test"]) == ["size"]
    assert list(columns["size_predicted"]) == [sorted(set(names))[k] for k in probabilities.argmax(0)]


def test_two_classes_are_predicted_by_name(tmp_path: Path) -> None:
    columns = {"hit": [("Inactive", "Active", "")[k % 3] for k in range(40)], "ring": [int("1" in s) for s in SMILES]}
    file = table(tmp_path, columns)
    recipe(file).fit(1, methods=["direct"], progress=False).save(tmp_path / "run")
    tested, rows = written(tmp_path / "run" / "predictions.csv"), file.read_text().splitlines()
    for row, *cells in zip(*(tested[name] for name in ("row", "smiles", "hit", "ring")), strict=True):
        assert rows[int(row) - 1] == ",".join(cells)
    again = Predictor.load(tmp_path / "run").predict(SMILES)
    assert again.target.pairs == (("Inactive", "Active"), ("0", "1"))
    assert again.decisions == [
        ("Active" if hit >= 0.5 else "Inactive", "1" if ring >= 0.5 else "0") for hit, ring in again.values
    ]


def test_a_run_takes_the_splits_of_another(tmp_path: Path) -> None:
    file = table(tmp_path, {"length": [len(smiles) / 10 for smiles in SMILES]})
    recipe(file).fit(1, methods=["direct"], progress=False).save(tmp_path / "run")
    again = MoleculeTask.from_csv(file, splits=tmp_path / "run" / "splits.json")
    assert [graph.smiles for graph in again.splits["test"]] == list(
        written(tmp_path / "run" / "predictions.csv")["smiles"]
    )
