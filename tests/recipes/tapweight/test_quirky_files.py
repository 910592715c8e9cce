"""Files as people have them, of either modality: the right cells and labels, or one sentence with a remedy."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from mlopt.recipes.tapweight.files import DataError
from mlopt.recipes.tapweight.labels import labels_of
from mlopt.recipes.tapweight.molecules.data import read_table
from mlopt.recipes.tapweight.molecules.task import MoleculeTask
from mlopt.recipes.tapweight.splits import random_split, stratified_split
from mlopt.recipes.tapweight.tables import table_of
from mlopt.recipes.tapweight.text.data import read_table as text_table
from mlopt.recipes.tapweight.text.splitting import divided, meanings


@pytest.mark.parametrize(
    ("content", "cells"),
    [
        # Separators after the last column, in the rows or in the header alone.
        ("a,b\n1,2,\n3,4,,\n", [["1", "2"], ["3", "4"]]),
        ("a,b,\n1,2\n3,4\n", [["1", "2"], ["3", "4"]]),
        # Excel's first line.
        ("sep=;\na;b\n1,5;x\n2;y\n", [["1.5", "x"], ["2", "y"]]),
        # Quoted decimal commas; "1,234" may be thousands, and stays.
        ('a,b\n"1,5",x\n"2,25",y\n', [["1.5", "x"], ["2.25", "y"]]),
        ('a,b\n"1,234",x\n"2,500",y\n', [["1,234", "x"], ["2,500", "y"]]),
        ('a,b\n"0,234",x\n"2,500",y\n', [["0.234", "x"], ["2.500", "y"]]),
    ],
)
def test_the_cells_of_a_table(content: str, cells: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(content)
    table = table_of(tmp_path / "t.csv")
    assert (table.header, [list(row) for row in table.cells]) == (("a", "b"), cells)


def test_rows_below_the_first_line_of_excel_keep_their_places(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("sep=;\r\na;b\r\n1;x\r\n")
    assert table_of(tmp_path / "t.csv").rows == (3,)


def test_a_cell_too_many_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("# of a survey\na,b\n1,2\n")
    with pytest.raises(DataError, match=r"row 2: 2 cells, .* has 1; .*, or leave out the lines above the names of the"):
        table_of(tmp_path / "t.csv")


def test_records_by_a_name_beside_other_keys(tmp_path: Path) -> None:
    records = [{"text": "x", "label": 1}, {"text": "y", "label": 0}]
    (tmp_path / "t.json").write_text(json.dumps({"version": 1, "data": records}))
    table = table_of(tmp_path / "t.json")
    assert (table.header, table.cells) == (("text", "label"), (["x", 1], ["y", 0]))


def column(*cells: Any) -> list[tuple[int, Any]]:
    return list(enumerate(cells, start=2))


@pytest.mark.parametrize(
    ("cells", "sentence"),
    [
        (
            ["0.4 uM", "0.5 uM", "0.6 uM"],
            r"f, row 2, column 'y': '0.4 uM' is not a number; write numbers without units",
        ),
        (
            ["1,000", "2,500", "3,250"],
            r"row 2, column 'y': '1,000' is not a number; .*, or give --kind classification",
        ),
        ([f"{k / 2}%" for k in range(40)], r"'0.0%' is not a number; write numbers without units or commas"),
        (
            [{"v": 1}, {"v": 2}],
            r"f, row 2, column 'y': \{'v': 1\} is an object with keys; write a number or a class, or",
        ),
        (
            ["Yes", "no", "YES"],
            r"f, row 4, column 'y': the class 'YES' differs from 'Yes' only in case; write each class",
        ),
        ([[], ["a"]], r"column 'y': the lists hold only the class 'a'; give at least two"),
    ],
)
def test_cells_that_are_not_labels(cells: list[Any], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        labels_of("f", "y", column(*cells), rows_per_class=5)


@pytest.mark.parametrize("cell", ["1", "0", "3.5"])
def test_one_value_in_all_rows_cannot_be_learned(cell: str, tmp_path: Path) -> None:
    rows = "".join(f"{'C' * k},{cell if k % 3 else ''}\n" for k in range(1, 20))
    (tmp_path / "t.csv").write_text(f"smiles,y\n{rows}")
    sentence = (
        rf"t\.csv, column 'y': every label is {cell}, so nothing can be learned; name another column with --labels"
    )
    with pytest.raises(DataError, match=sentence):
        MoleculeTask.from_csv(tmp_path / "t.csv", split="random")
    (tmp_path / "t.csv").write_text(f"smiles,text,label\n{''.join(f'C,text {k},{cell}' + chr(10) for k in range(20))}")
    texts = text_table(tmp_path / "t.csv")
    with pytest.raises(DataError, match=sentence.replace("'y'", "'label'")):
        divided(texts, meanings(texts))


def test_large_labels_differ_in_their_last_digits(tmp_path: Path) -> None:
    rows = [f"{'C' * k},{1_000_000 + k}" for k in range(1, 31)]
    (tmp_path / "t.csv").write_text("\n".join(["smiles,y", *rows, "C,1000002"]) + "\n")
    task = MoleculeTask.from_csv(tmp_path / "t.csv", split="random")
    assert task.kind == "regression"
    assert task.remarks[1] == "of these, with different labels: 1; C in rows 2, 32 (y: 1000001, 1000002)"


@pytest.mark.parametrize("spelling", ["#N/A", "None", "<NA>", "nan", "NULL", "n/a", "-nan"])
def test_spellings_of_a_missing_number(spelling: str) -> None:
    labels = labels_of("f", "y", column("1.5", spelling, "2.25"))
    assert (labels.form, labels.is_missing(spelling), labels.is_missing("1.5")) == ("numbers", True, False)


def test_a_class_that_may_be_missing_is_named() -> None:
    (remark,) = labels_of("f", "y", column("kind", "nan", "unkind")).remarks()
    assert remark == "y: 3 classes, kind, nan, unkind; give --missing 'nan' if this means no label"


@pytest.mark.parametrize("cells", [["1 star", "2 stars", "1 star", "2 stars"], ["5HT", "3CL", "5HT", "3CL"]])
def test_classes_may_begin_with_a_number(cells: list[str]) -> None:
    assert labels_of("f", "y", column(*cells)).classes == tuple(sorted(set(cells)))


@pytest.mark.parametrize(
    ("name", "cells", "reason"),
    [
        ("unit", ["nM", "nM", "nM"], "'nM' in all rows"),
        ("measured", ["2020-01-31", "2021-02-01", "2021-02-01"], "dates"),
        ("measured", [datetime.date(2020, 1, 31)] * 3, "dates"),
    ],
)
def test_columns_that_nobody_predicts(name: str, cells: list[Any], reason: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"smiles": ["CCO", "CC", "C"], "y": [1.5, 2.5, 0.0], name: cells})
    molecules = read_table(data)
    assert molecules.label_names == ("y",)
    assert molecules.notes[-1] == f"not predicted: '{name}' ({reason}); name a column with --labels to predict it"


def test_the_number_0_is_not_an_empty_smiles(tmp_path: Path) -> None:
    rows = [{"smiles": k, "y": k / 2} for k in range(3)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        DataError, match=r"t\.jsonl: no row is a molecule; row 1: '0' is not a molecule: not valid SMILES"
    ):
        read_table(tmp_path / "t.jsonl")


def test_a_table_of_one_column_names_the_separators(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("smiles y\nCCO 1.5\nCC 2\n")
    with pytest.raises(
        DataError, match=r"the only column is 'smiles y', .* or separate the cells by commas, semicolons"
    ):
        read_table(tmp_path / "t.csv")


def test_an_empty_split_is_counted() -> None:
    with pytest.raises(DataError, match=r"^1 example is too few for the train split"):
        random_split(1)
    with pytest.raises(DataError, match=r"^40 examples \(1 distinct\) are too few for the valid split"):
        random_split(40, groups=["same"] * 40)
    with pytest.raises(DataError, match=r"^40 examples \(40 classes\) are too few for the valid split"):
        stratified_split(list(range(40)))
