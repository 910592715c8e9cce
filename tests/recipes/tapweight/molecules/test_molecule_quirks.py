"""Tables of molecules as people have them: the right labels and splits, or one sentence with a remedy."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from rdkit import Chem

from mlopt.recipes.tapweight.files import DataError
from mlopt.recipes.tapweight.molecules.data import Molecules, read_corpus, read_table
from mlopt.recipes.tapweight.molecules.splits import balanced_scaffold_split, scaffold_split
from mlopt.recipes.tapweight.molecules.task import MoleculeTask
from mlopt.recipes.tapweight.task import Split

CASES = Path(__file__).parents[1] / "cases" / "molecules"
#: The solubilities of most cases, in tenths.
TENTHS = torch.arange(-20, 20).double() / 10


def labels_of(molecules: Molecules) -> torch.Tensor:
    return torch.cat([graph.y for graph in molecules]).double()


@pytest.mark.parametrize(
    ("name", "label", "notes"),
    [
        ("pandas_index.csv", "logS", ["not predicted: '' (without a name)"]),
        ("id_and_weight.csv", "logS", ["not predicted: 'compound_id' (an identifier), 'MW' (the molecular weight)"]),
        ("semicolon.csv", "logS", ["the cells are separated by semicolons"]),
        ("decimal_comma.csv", "logS", ["the cells are separated by semicolons", "decimal commas in 'logS'"]),
        ("tabs.tsv", "logS", []),
        ("other_smiles_column.csv", "y", ["SMILES are read from 'isosmiles'", "not predicted: 'name' (an identifier)"]),
        ("with_split_column.csv", "y", ["not predicted: 'split' (the names of splits, see --split-column)"]),
    ],
)
def test_the_label_is_found_and_what_is_not_predicted_is_named(name: str, label: str, notes: list[str]) -> None:
    molecules = read_table(CASES / name)
    assert molecules.label_names == (label,)
    assert (len(molecules), molecules[0].smiles, molecules[39].smiles) == (40, "CCO", "ClCCl")
    torch.testing.assert_close(labels_of(molecules)[:, 0], TENTHS, atol=1e-6, rtol=0)
    assert [note.partition("; name a column")[0] for note in molecules.notes] == notes


def test_a_column_that_is_named_is_predicted_and_others_can_be_ignored() -> None:
    file = CASES / "id_and_weight.csv"
    assert read_table(file, labels=["MW"]).label_names == ("MW",)
    with pytest.raises(
        DataError, match=r"no column other than 'smiles' has labels; ignored: 'compound_id' .*; name the columns"
    ):
        read_table(file, ignore=["logS"])
    assert read_table(file, smiles_column="smiles", ignore=["MW"]).label_names == ("logS",)
    with pytest.raises(DataError, match=r"no column 'smi'; .*; name the column with --smiles-column"):
        read_table(file, smiles_column="smi")


@pytest.mark.parametrize(
    ("name", "summary", "ones"),
    [
        ("minus_one_plus_one.csv", "active: two classes, -1, 1; 1 is the positive one", 20),
        ("active_inactive.csv", "outcome: two classes, Inactive, Active; Active is the positive one", 14),
    ],
)
def test_two_classes_become_0_and_1(name: str, summary: str, ones: int) -> None:
    molecules = read_table(CASES / name)
    assert [each.summary() for each in molecules.meanings] == [summary]
    with (CASES / name).open() as file:
        _, *rows = csv.reader(file)
    positive = [float(row[1] in ("1", "Active")) for row in rows]
    assert labels_of(molecules)[:, 0].tolist() == positive
    assert sum(positive) == ones
    task = MoleculeTask.from_csv(CASES / name)
    assert (task.kind, task.metric_name) == ("classification", "roc_auc")
    assert summary in task.remarks


def test_three_classes_are_one_task_with_a_cross_entropy() -> None:
    task = MoleculeTask.from_csv(CASES / "three_classes.csv", split="stratified")
    assert task.subject() == "classification into 0, 1, 2"
    batch = next(iter(task.loader("train", 5)))
    outputs = torch.randn(5, 3, dtype=torch.float64)
    classes = batch.y.argmax(1)
    torch.testing.assert_close(
        task.losses(outputs, batch), torch.nn.functional.cross_entropy(outputs, classes, reduction="none")
    )
    batch.y[0] = torch.nan
    assert float(task.losses(outputs, batch)[0]) == 0
    metric = MoleculeTask.from_csv(CASES / "three_classes.csv", split="stratified", metric="accuracy").metric()
    right = outputs.argmax(1) == classes
    metric.update(outputs, batch.y)
    assert float(metric.compute()) == pytest.approx(float(right[1:].double().mean()))


def test_bounds_are_refused_with_a_remedy_that_works() -> None:
    file = CASES / "censored.csv"
    with pytest.raises(
        DataError, match=r"censored\.csv, row 2, column 'ic50_nM': '>10000' is a bound, .* --missing '>10000'"
    ):
        read_table(file)
    labels = labels_of(read_table(file, missing=[">10000"]))[:, 0]
    assert labels.isnan().nonzero()[:, 0].tolist() == [0, 7, 14, 21, 28, 35]
    assert labels[1:4].tolist() == [10, 20, 30]


@pytest.mark.parametrize("split", ["scaffold", "balanced", "random"])
def test_rows_of_one_molecule_stay_together_and_contradictions_are_named(split: Any) -> None:
    task = MoleculeTask.from_csv(CASES / "duplicates_with_contradicting_labels.csv", split=split)
    homes: dict[str, set[str]] = {}
    for name, molecules in task.splits.items():
        for smiles in molecules.smiles:
            homes.setdefault(Chem.CanonSmiles(smiles), set()).add(name)
    assert all(len(names) == 1 for names in homes.values())
    for name in get_args(Split):
        assert list(task.keys(name)) == [Chem.CanonSmiles(smiles) for smiles in task.splits[name].smiles]
    assert task.remarks[0] == "molecules of duplicates_with_contradicting_labels.csv listed more than once: 2"
    assert task.remarks[1] == (
        "of these, with different labels: 2; CCO in rows 2, 42, 43 (y: -2, 9, -9); Cc1ccccc1 in rows 6, 44 (y: -1.6, 5)"
    )


def test_atom_maps_do_not_matter() -> None:
    molecules = read_table(CASES / "atom_maps.csv")
    first, second = molecules[0], molecules[1]
    assert first.smiles == second.smiles == "c1onnc1C1CN1"
    assert torch.equal(first.x, second.x)
    assert torch.equal(first.edge_index, second.edge_index)
    mapped = [line.split(",")[0] for line in (CASES / "atom_maps.csv").read_text().splitlines()[1:]]
    home = [name for name, indices in scaffold_split(mapped).items() if {0, 1} & set(indices)]
    assert len(home) == 1
    for split in ("scaffold", "random", "stratified"):
        task = MoleculeTask.from_csv(CASES / "atom_maps.csv", split=split)  # type: ignore[arg-type]
        assert sum(first.smiles in part.smiles for part in task.splits.values()) == 1


def test_bad_rows_are_left_out_and_each_is_reported() -> None:
    task = MoleculeTask.from_csv(CASES / "bad_rows.csv", split="stratified")
    ((source, skipped),) = task.skipped
    assert source == str(CASES / "bad_rows.csv")
    assert [each.row for each in skipped] == [42, 43, 44, 45, 46]  # RDKit reads the last, a radical
    assert sum(map(len, task.splits.values())) + len(skipped) == 46
    assert task.remarks[0].startswith(
        f"{46 - len(skipped)} molecules of bad_rows.csv; {len(skipped)} skipped: row 42 (not valid"
    )
    with (CASES / "bad_rows.csv").open() as file:
        rows = [row for line, row in enumerate(csv.reader(file), start=1) if line not in (1, 42, 43, 44, 45, 46)]
    missing = [[not cell for cell in cells] for _, *cells in rows]
    assert labels_of(read_table(CASES / "bad_rows.csv")).isnan().tolist() == missing


def test_a_label_that_follows_the_scaffold_needs_another_split() -> None:
    """All molecules of class 1 have one scaffold, so no split by scaffold has both classes in each part."""
    file = CASES / "label_follows_scaffold.csv"
    for split in ("scaffold", "balanced"):
        with pytest.raises(DataError, match=r"--split (stratified|random).*--split-fractions"):
            MoleculeTask.from_csv(file, split=split)  # type: ignore[arg-type]
    task = MoleculeTask.from_csv(file, split="stratified", fractions=(0.5, 0.25, 0.25))
    assert [labels_of(part).unique().tolist() for part in task.splits.values()] == [[0, 1]] * 3


def test_a_balanced_split_keeps_scaffolds_whole_and_shares_classes() -> None:
    rings = [
        "c1ccccc1",
        "C1CCCCC1",
        "c1ccncc1",
        "C1CCNCC1",
        "c1ccoc1",
        "c1ccsc1",
        "C1CCOC1",
        "C1CC1",
        "C1CCC1",
        "C1CCNC1",
    ]
    smiles = [f"{'C' * k}{ring}" for ring in rings for k in range(1, 5)]
    labels = torch.tensor([[float(ring < 4)] for ring in range(len(rings)) for _ in range(4)])
    splits = balanced_scaffold_split(smiles, labels, (0.5, 0.25, 0.25))
    assert sorted(index for indices in splits.values() for index in indices) == list(range(40))
    assert all(
        len({name for name, own in splits.items() if index // 4 in {i // 4 for i in own}}) == 1 for index in range(40)
    )
    assert {name: (len(own), float(labels[own].sum())) for name, own in splits.items()} == {
        "train": (20, 8.0), "valid": (pytest.approx(10, abs=2), 4.0), "test": (pytest.approx(10, abs=2), 4.0),
    }  # fmt: skip


def test_the_split_of_a_column_or_a_file_is_taken(tmp_path: Path) -> None:
    file = CASES / "with_split_column.csv"
    task = MoleculeTask.from_csv(file, split_column="split")
    with file.open() as stream:
        rows = list(csv.DictReader(stream))
    for name, molecules in task.splits.items():
        assert list(molecules.smiles) == [row["smiles"] for row in rows if row["split"] == name]
    numbers = {name: list(molecules.record_numbers()) for name, molecules in task.splits.items()}
    (tmp_path / "splits.json").write_text(json.dumps(numbers))
    again = MoleculeTask.from_csv(file, splits=tmp_path / "splits.json")
    assert {k: v.smiles for k, v in again.splits.items()} == {k: v.smiles for k, v in task.splits.items()}


def test_record_numbers_count_the_rows_that_were_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('smiles,y\nzz,1\nCC,2.5\n\nzz,1\n"CCC",3.5\n')
    molecules = read_table(tmp_path / "a.csv")
    assert (molecules.rows, molecules.record_numbers()) == ((3, 6), (1, 3))
    assert molecules.subset([1]).record_numbers() == (3,)


def test_an_sd_file_is_a_table(tmp_path: Path) -> None:
    with Chem.SDWriter(str(tmp_path / "a.sdf")) as writer:
        for smiles, value in (("CCO", "1.5"), ("c1ccccc1", "-2")):
            molecule = Chem.MolFromSmiles(smiles)
            molecule.SetProp("logS", value)
            writer.write(molecule)
    text = (tmp_path / "a.sdf").read_text()
    (tmp_path / "a.sdf").write_text(text.replace("$$$$\n", "$$$$\nno block\n\n\nM  END\n$$$$\n", 1))
    molecules = read_table(tmp_path / "a.sdf")
    assert (molecules.smiles, molecules.rows, labels_of(molecules)[:, 0].tolist()) == (
        ("CCO", "c1ccccc1"),
        (1, 3),
        [1.5, -2],
    )
    assert [skipped.row for skipped in molecules.skipped] == [2]
    assert read_corpus(tmp_path / "a.sdf").smiles == ("CCO", "c1ccccc1")
    (tmp_path / "b.sdf").write_text("nothing\n")
    with pytest.raises(DataError, match=r"b\.sdf: RDKit reads no molecule from \d blocks; give an SD file"):
        read_table(tmp_path / "b.sdf")


def test_blank_lines_at_the_end_of_an_sd_file_are_no_block(tmp_path: Path) -> None:
    block = Chem.MolToMolBlock(Chem.MolFromSmiles("CCO"))
    (tmp_path / "a.sdf").write_text(f"{block}> <y>\n1\n\n$$$$\n{block}> <y>\n2\n\n$$$$\n\n \n")
    molecules = read_table(tmp_path / "a.sdf", kind="regression")
    assert (molecules.rows, molecules.skipped) == ((1, 2), ())


def test_an_sd_file_is_read_in_the_encodings_of_tables(tmp_path: Path) -> None:
    for k, molecule in enumerate(map(Chem.MolFromSmiles, ("CCO", "c1ccccc1"))):
        with open(tmp_path / "a.sdf", "a", encoding="cp1252") as file:
            file.write(f"{Chem.MolToMolBlock(molecule)}> <löslich>\n{k}.5\n\n$$$$\n")
    molecules = read_table(tmp_path / "a.sdf")
    assert molecules.label_names == ("löslich",)
    assert [float(graph.y) for graph in molecules] == [0.5, 1.5]
    assert molecules.notes == ("read as Windows-1252",)


def test_columns_of_different_kinds_are_not_predicted_together(tmp_path: Path) -> None:
    rows = "".join(f"{'C' * k},{k / 10},{k % 2},{'ab'[k % 2]}\n" for k in range(1, 11))
    (tmp_path / "a.csv").write_text(f"smiles,x,y,z\n{rows}")
    with pytest.raises(
        DataError,
        match=r"cannot be predicted together \(x: numbers; y: two classes.*with --labels, name columns of one kind only",
    ):
        read_table(tmp_path / "a.csv")
    numbers = read_table(tmp_path / "a.csv", labels=["x", "y"])
    assert {each.form for each in numbers.meanings} == {"numbers"}
    classes = read_table(tmp_path / "a.csv", labels=["y", "z"])
    assert {each.form for each in classes.meanings} == {"binary"}
    assert torch.equal(*labels_of(classes).T)


def test_labels_of_other_files_have_the_meaning_of_the_training_file(tmp_path: Path) -> None:
    for name, rows in (
        ("a", "C,Active\nCC,Inactive\n"),
        ("b", "CN,Inactive\nCO,Active\n"),
        ("c", "CF,Maybe\nCCl,Active\n"),
    ):
        (tmp_path / f"{name}.csv").write_text(f"smiles,y\n{rows}")
    files = [tmp_path / f"{name}.csv" for name in "abc"]
    assert labels_of(read_table(files[1], like=read_table(files[0])))[:, 0].tolist() == [0, 1]
    with pytest.raises(
        DataError, match=r"c\.csv, row 2, column 'y': 'Maybe' is not one of the classes, Inactive, Active; correct"
    ):
        MoleculeTask.from_csv(files[0], valid=files[1], test=files[2])


def test_molecules_of_two_given_splits_are_reported(tmp_path: Path) -> None:
    for name, rows in (("a", "CCO,1\nCCN,0\n"), ("b", "OCC,1\nCF,0\n"), ("c", "CBr,1\nCCl,0\n")):
        (tmp_path / f"{name}.csv").write_text(f"smiles,y\n{rows}")
    task = MoleculeTask.from_csv(tmp_path / "a.csv", valid=tmp_path / "b.csv", test=tmp_path / "c.csv")
    assert task.remarks == ("1 of 2 valid molecules are also among the training molecules",)


def test_every_metric_is_computed_task_by_task() -> None:
    from sklearn.metrics import mean_absolute_error, r2_score

    task = MoleculeTask.from_csv(CASES / "semicolon.csv")
    labels = labels_of(task.splits["test"])
    outputs = torch.linspace(-1, 1, len(labels), dtype=torch.float64)[:, None]
    predicted = outputs * task.std + task.mean
    scores = task.measures(outputs, labels)["logS"]
    assert scores["mae"] == pytest.approx(mean_absolute_error(labels, predicted))
    assert scores["r2"] == pytest.approx(r2_score(labels, predicted))
