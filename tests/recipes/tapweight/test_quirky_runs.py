"""Whole runs on files as people have them: their scores, and predictions and features for the rows of the same file."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import random
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import pytest
from command_cases import SMILES, load, merged, succeed
from rdkit import Chem
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, r2_score, roc_auc_score
from text_cases import encoder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--epochs", "1", "--steps", "2", "--methods", "equal", "--device", "cpu", "--split", "random"]
MOLECULES = [*SMALL, *["--width", "8", "--layers", "1", "--objectives", "masked_atoms", "contrastive"]]
TEXT = [*SMALL, *["--max-length", "16", "--batch-size", "8", "--objectives", "masked_tokens", "contrastive"]]
THIRDS = ["--split-fractions", "0.4", "0.3", "0.3"]
NO_LABEL = "the label is missing"


@attrs.frozen
class Quirk:
    """A file, and what a run on it must find.

    Args:
        name: the name of the file.
        content: its bytes.
        records: the row, the contents and the labels of each record, as the file has them; an empty label is missing.
        target: entries of the target in predictor.json.
        options: further options.
        skipped: the reason of each row that is left out.
        modality: "molecules" or "text".
    """

    name: str
    content: bytes
    records: list[tuple[int, tuple[str, ...], dict[str, str]]]
    target: dict[str, Any]
    options: Sequence[str] = ()
    skipped: dict[int, str] = attrs.field(factory=dict)
    modality: str = "molecules"


def delimited(rows: Sequence[Sequence[str]], separator: str = ",") -> str:
    stream = io.StringIO()
    csv.writer(stream, delimiter=separator).writerows(rows)
    return stream.getvalue()


def zipped(name: str, content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, content)
    return stream.getvalue()


def decimal_commas() -> Quirk:
    values = [str(len(smiles) / 10) for smiles in SMILES]
    rows = [[smiles, value.replace(".", ",")] for smiles, value in zip(SMILES, values, strict=True)]
    content = zipped("data/inner.csv", delimited([["smiles", "logS"], *rows], ";").encode("utf-16"))
    records = [
        (k + 2, (smiles,), {"logS": value}) for k, (smiles, value) in enumerate(zip(SMILES, values, strict=True))
    ]
    return Quirk("archive.zip", content, records, {"form": "numbers", "labels": ["logS"]})


def two_names_with_gaps() -> Quirk:
    labels = [("Inactive", "Active", "")[k % 3] for k, _ in enumerate(SMILES)]
    cells = [[smiles, label] for smiles, label in zip(SMILES, labels, strict=True)]
    cells[4:4] = [["C1CC", "Active"], ["", "Active"], ["C(C)(C)(C)(C)C", ""]]
    lines = delimited([["smiles", "activité"], *cells]).splitlines()
    lines.insert(3, "")  # so the records from the third on lie one row further down
    records = [(k + 2 + (k >= 2), (smiles,), {"activité": label}) for k, (smiles, label) in enumerate(cells)]
    valence = "Explicit valence for atom # 0 C, 5, is greater than permitted"
    skipped = {7: "not valid SMILES", 8: "the SMILES is empty", 9: valence}
    content = "\r\n".join(lines).encode("cp1252")
    target = {"form": "binary", "labels": ["activité"], "pairs": [["Inactive", "Active"]]}
    return Quirk("a.csv", content, records, target, THIRDS, skipped)


def named_classes() -> Quirk:
    labels = [("low", "mid", "High", "")[k % 4] for k, _ in enumerate(SMILES)]
    cells = [[smiles, label] for smiles, label in zip(SMILES, labels, strict=True)]
    content = lzma.compress(delimited([["smiles", "size"], *cells], "\t").encode())
    records = [(k + 2, (smiles,), {"size": label}) for k, (smiles, label) in enumerate(cells)]
    return Quirk("a.tsv.xz", content, records, {"form": "classes", "classes": ["High", "low", "mid"]}, THIRDS)


def a_list_of_smiles() -> Quirk:
    lines = [f"{smiles} {len(smiles) / 10}" for smiles in SMILES]
    lines[2:2] = ["# a comment", "C1CC 3", ""]
    cells = [(row, *line.split()) for row, line in enumerate(lines, start=1) if line and not line.startswith("#")]
    records = [(row, (smiles,), {"column 2": label}) for row, smiles, label in cells]
    target = {"form": "numbers", "labels": ["column 2"]}
    return Quirk("a.smi", "\n".join(lines).encode(), records, target, skipped={4: "not valid SMILES"})


def an_sd_file() -> Quirk:
    stream = io.StringIO()
    with Chem.SDWriter(stream) as writer:
        for smiles in SMILES:
            molecule = Chem.MolFromSmiles(smiles)
            molecule.SetProp("logS", str(len(smiles) / 10))
            writer.write(molecule)
    text = stream.getvalue().replace("$$$$\n", "$$$$\nno block\n\n\nM  END\n> <logS>\n0.3\n\n$$$$\n", 1)
    written = [(Chem.CanonSmiles(smiles), str(len(smiles) / 10)) for smiles in SMILES]
    written.insert(1, ("", ""))
    records = [(k, (smiles,), {"logS": label}) for k, (smiles, label) in enumerate(written, start=1)]
    skipped = {2: "RDKit cannot read this block of the SD file"}
    target = {"form": "numbers", "labels": ["logS"]}
    return Quirk("a.sdf.gz", gzip.compress(text.encode()), records, target, skipped=skipped)


def another_smiles_column() -> Quirk:
    cells = [["C" * (k % 5 + 1), smiles, str(k % 2)] for k, smiles in enumerate(SMILES)]
    records = [(k + 2, (own[1],), {"y": own[2]}) for k, own in enumerate(cells)]
    content = delimited([["smiles", "isomeric", "y"], *cells]).encode()
    options = ["--smiles-column", "isomeric", "--labels", "y", *THIRDS]
    return Quirk("a.csv", content, records, {"form": "binary", "pairs": [["0", "1"]]}, options)


def of_27_columns(contents: Sequence[str], column: str, **more: Any) -> Quirk:
    draw, names = random.Random(1), [f"task {k}" for k in range(27)]
    cells = [[content, *(draw.choice(("0", "1", "")) for _ in names)] for content in contents]
    records = [(k + 2, (own[0],), dict(zip(names, own[1:], strict=True))) for k, own in enumerate(cells)]
    content = delimited([[column, *names], *cells]).encode()
    return Quirk("a.csv", content, records, {"form": "binary", "labels": names}, **more)


def molecules_of_27_columns() -> Quirk:
    return of_27_columns(SMILES, "smiles", options=THIRDS)


def texts_of_27_columns() -> Quirk:
    texts = [f"thing{k % 20} is good {k}" for k in range(60)]
    options = ["--labels", *(f"task {k}" for k in range(27)), *THIRDS, "--split", "stratified"]
    return of_27_columns(texts, "text", options=options, modality="text")


def pairs_with_scores() -> Quirk:
    draw = random.Random(2)
    pairs = [(f"thing{k % 20} is good", f"thing{k % 7} is bad", str(draw.randrange(12) / 2)) for k in range(48)]
    pairs[5:5] = [("", "thing2", "1.5"), ("thing1", "thing2", "")]
    lines = [json.dumps({"sentence1": a, "sentence2": b, "label": label or None}) for a, b, label in pairs]
    records = [(k, (a, b), {"label": label}) for k, (a, b, label) in enumerate(pairs, start=1)]
    skipped = {6: "the text is empty", 7: NO_LABEL}
    content = "\n".join(lines).encode()
    return Quirk("a.jsonl", content, records, {"form": "numbers"}, skipped=skipped, modality="text")


def several_classes() -> Quirk:
    draw = random.Random(3)
    labels = [[name for name in ("bio", "cs") if draw.random() < 0.5] for _ in range(60)]
    rows = [{"text": f"thing{k % 20} is good {k}", "labels": own if k != 3 else None} for k, own in enumerate(labels)]
    records = [
        (k, (str(row["text"]),), {name: str(int(name in (row["labels"] or ()))) for name in ("bio", "cs")})
        for k, row in enumerate(rows, start=1)
    ]
    content, target = json.dumps(rows).encode(), {"form": "binary", "labels": ["bio", "cs"]}
    return Quirk("a.json", content, records, target, skipped={4: NO_LABEL}, modality="text")


def another_text_column() -> Quirk:
    draw = random.Random(4)
    words = ("très bon", "bon", "mauvais")
    cells = [[f"bad thing{k % 9}", f"thing{k % 20} is café {k}", draw.choice(words)] for k in range(60)]
    records = [(k + 2, (own[1],), {"label": own[2]}) for k, own in enumerate(cells)]
    content = delimited([["text", "abstract", "label"], *cells], "|").encode("latin-1")
    target = {"form": "classes", "labels": ["label"], "classes": ["bon", "mauvais", "très bon"]}
    return Quirk("a.csv", content, records, target, ["--text", "abstract"], modality="text")


QUIRKS: tuple[Callable[[], Quirk], ...] = (
    decimal_commas, two_names_with_gaps, named_classes, a_list_of_smiles, an_sd_file, another_smiles_column,
    molecules_of_27_columns, texts_of_27_columns, pairs_with_scores, several_classes, another_text_column,
)  # fmt: skip


def rows_of(file: Path) -> list[dict[str, str]]:
    with open(file, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def measures(target: dict[str, Any], rows: list[dict[str, str]]) -> dict[str, dict[str, float]]:
    """Return scores of scikit-learn for written predictions, by label."""
    scores: dict[str, dict[str, float]] = {}
    for k, label in enumerate(target["labels"]):
        own = [row for row in rows if row[label]]
        if target["form"] == "numbers":
            true, predicted = ([float(row[name]) for row in own] for name in (label, f"{label}_predicted"))
            scores[label] = {"mae": mean_absolute_error(true, predicted), "r2": r2_score(true, predicted)}
            continue
        names = target["classes"] if target["form"] == "classes" else target["pairs"][k]
        true, predicted = ([names.index(row[name]) for row in own] for name in (label, f"{label}_predicted"))
        scores[label] = {"accuracy": accuracy_score(true, predicted)}
        columns = names if target["form"] == "classes" else [label]
        likely = np.array([[float(row[f"{name}_probability"]) for name in columns] for row in own])
        if target["form"] == "classes":
            assert likely.argmax(1).tolist() == predicted
            present = sorted(set(true))
            each = [roc_auc_score(np.array(true) == index, likely[:, index]) for index in present if len(present) > 1]
            scores[label] |= {"roc_auc": float(np.mean(each))} if each else {}
        elif len(set(true)) == 2:
            scores[label]["roc_auc"] = roc_auc_score(true, likely[:, 0])
    return scores


def check_scores(target: dict[str, Any], rows: list[dict[str, str]], written: dict[str, dict[str, float]]) -> None:
    """Check that the scores of a run are those of its written predictions."""
    if set(written) == set(target["labels"]):
        expected = measures(target, rows)
    else:  # any number of classes at once are scored together
        true, predicted = (
            [[int(row[f"{label}{end}"]) for label in target["labels"]] for row in rows] for end in ("", "_predicted")
        )
        expected = {name: {"micro_f1": f1_score(true, predicted, average="micro")} for name in written}
    for label, own in expected.items():
        assert {name: written[label][name] for name in own} == pytest.approx(own, rel=1e-4, abs=1e-6)


def check_predictions(quirk: Quirk, rows: list[dict[str, str]], columns: list[str], tested: dict[int, Any]) -> None:
    """Check the predictions for the rows of the file: contents, reasons, and those of the test split as the run wrote them."""
    for (place, contents, _), row in zip(quirk.records, rows, strict=True):
        reason = quirk.skipped.get(place, "")
        reason = "" if reason == NO_LABEL else reason
        assert row["reason"].startswith(reason)
        assert bool(row["reason"]) == bool(reason)
        assert tuple(row[column] for column in columns) == contents
        cells = {name: cell for name, cell in row.items() if name not in (*columns, "reason")}
        assert all(cells.values()) is not bool(reason)
        assert place not in tested or all(same(cell, tested[place][name]) for name, cell in cells.items())


def same(cell: str, other: str) -> bool:
    """Return True if two cells are the same text, or nearly the same number."""
    try:
        return cell == other or float(cell) == pytest.approx(float(other), rel=1e-4, abs=1e-6)
    except ValueError:
        return False


@pytest.mark.parametrize("quirk", QUIRKS, ids=lambda quirk: quirk.__name__)
def test_a_run_predicts_for_the_rows_of_its_file(quirk: Callable[[], Quirk], tmp_path: Path) -> None:
    own = quirk()
    file, output = tmp_path / own.name, tmp_path / "run"
    file.write_bytes(own.content)
    data = ["--train", str(file), "--output", str(output)]
    if own.modality == "text":
        encoder().save(tmp_path / "model")
        words = [*data, "--model", str(tmp_path / "model"), *TEXT]
    else:
        words = [*data, "--corpus", str(file), *MOLECULES]
        words += ["--smiles-column", "isomeric"] * ("isomeric" in own.options)
    succeed(["tapweight", own.modality, *merged([*words, *own.options])])

    description, tested = load(output, "model", "predictor.json"), rows_of(output / "predictions.csv")
    target, columns = description["target"], description["columns"]
    assert {name: target[name] for name in own.target} == own.target
    known = {place: (contents, labels) for place, contents, labels in own.records if place not in own.skipped}
    for row in tested:
        contents, labels = known[int(row["row"])]
        assert tuple(row[column] for column in columns) == contents
        assert all(same(row[name], label) for name, label in labels.items())
    check_scores(target, tested, load(output, "scores.json")["predictor"]["test"])

    skipped = rows_of(output / "skipped.csv") if own.skipped else []
    assert (output / "skipped.csv").exists() == bool(own.skipped)
    assert {int(row["row"]) for row in skipped} == set(own.skipped)
    assert all(row["file"] == str(file) and row["reason"].startswith(own.skipped[int(row["row"])]) for row in skipped)

    common = [str(output), "--input", str(file), "--device", "cpu", "--output"]
    succeed(["tapweight", "predict", *common, str(tmp_path / "p.csv")])
    check_predictions(own, rows_of(tmp_path / "p.csv"), columns, {int(row["row"]): row for row in tested})
    succeed(["tapweight", "embed", *common, str(tmp_path / "e.npy")])
    usable = [own.skipped.get(place, NO_LABEL) == NO_LABEL for place, *_ in own.records]
    assert np.isfinite(np.load(tmp_path / "e.npy")).all(1).tolist() == usable
