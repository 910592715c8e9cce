"""The tutorials: their code and their commands run unchanged, in order, and what they say about the results holds."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlopt import cli

DOCS = Path(__file__).parents[2] / "docs"


def run(page: str) -> dict[str, Any]:
    """Run the blocks of a page in the current folder; return the names that its Python defines."""
    names: dict[str, Any] = {"__name__": "page"}
    for language, block in re.findall(r"```(python|sh)\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL):
        if language == "python":
            exec(compile(block, page, "exec"), names)
            continue
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "mlopt"
            assert cli.main(arguments) == 0
    return names


def rows_of(file: str) -> list[dict[str, str]]:
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def test_a_table_of_molecules_becomes_predictions_and_embeddings(folder: Path) -> None:
    names = run("molecules.md")
    table = re.findall(r"^\| (`.*?`) \|", (DOCS / "molecules.md").read_text(), flags=re.MULTILINE)
    files = {name for cell in table for name in re.findall(r"`(.*?)`", cell)}
    assert all((folder / "run" / name).exists() for name in files)
    assert {path.name for path in (folder / "run").iterdir()} - {name.rstrip("/") for name in files} == {
        "checkpoints", "config.json", "environment.json", "history.csv"
    }  # fmt: skip
    assert names["score"] > 0  # better than the mean of the labels
    assert len(names["tested"]) == 30
    aspirin, broken, caffeine = rows_of("predicted.csv")
    assert list(aspirin) == ["smiles", "logS_predicted", "logS_spread", "reason"]
    assert broken == {"smiles": "C1CC", "logS_predicted": "", "logS_spread": "", "reason": "not valid SMILES"}
    for row in (aspirin, caffeine):
        assert -12 < float(row["logS_predicted"]) < 3
        assert float(row["logS_spread"]) > 0
    assert np.isnan(np.load("embedded.npy")).all(1).tolist() == [False, True, False]
    assert names["predictions"].values.shape == (2, 1)
    assert names["features"].shape == (2, 32)


def test_labelled_texts_become_a_classifier_of_plain_transformers() -> None:
    names = run("texts.md")
    assert names["labels"] == ["positive", "negative"]
    predictions = names["predictions"]
    assert predictions.decisions[:2] == [("positive",), ("negative",)]
    assert predictions.values[:2] == pytest.approx(names["logits"].double().softmax(1).numpy(), rel=1e-5)
    assert predictions.reasons == ("", "", "the text is empty")
    rows = rows_of("predicted.csv")
    labels = [json.loads(line)["label"] for line in Path("reviews.jsonl").read_text().splitlines()]
    assert [row["label_predicted"] for row in rows] == labels
    assert np.load("embedded.npy").shape == (200, 32)
