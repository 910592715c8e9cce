"""Labelled .smi files: with and without names of the columns; the ones whose meaning is not clear are refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mlopt.recipes.tapweight.files import DataError
from mlopt.recipes.tapweight.molecules import read_corpus, read_table
from mlopt.recipes.tapweight.molecules.data import read_smiles


@pytest.mark.parametrize(
    ("content", "names", "expected"),
    [
        ("CCO 1.5\nCC\t-2\nC 0.25\n", ("column 2",), [[1.5], [-2.0], [0.25]]),
        ("CCO active\n\nCC inactive\nC active\n", ("column 2",), [[1.0], [0.0], [1.0]]),
        ("CCO mol-a 1\nCC mol-b 0\nC mol-c 1\n", ("column 3",), [[1.0], [0.0], [1.0]]),
        ("smiles toxic\nCCO 1\nCC 0\nC 0\n", ("toxic",), [[1.0], [0.0], [0.0]]),
        ("SMILES ID a b\nCCO 7 1.5 2\nCC 9 2.5 4\nC 8 nan 8\n", ("a", "b"), [[1.5, 2.0], [2.5, 4.0], None]),
        # Named, whole numbers that differ are labels.
        ("canonical_smiles counts\nCCO 3\nCC 20\nC 100\n", ("counts",), [[3.0], [20.0], [100.0]]),
        ("id smiles toxic\n7 CCO 1\n9 CC 0\n8 C 0\n", ("toxic",), [[1.0], [0.0], [0.0]]),
        ("SMILES_STRING toxic\nCCO 1\nCC 0\nC 0\n", ("toxic",), [[1.0], [0.0], [0.0]]),
        # The cells between single tabs may be empty or hold blanks.
        ("CCO\tethyl alcohol\t1\nCC\tethane\t0\nC\tmethane\t1\n", ("column 3",), [[1.0], [0.0], [1.0]]),
        ("CCO\t1\t\nCC\t\t0\nC\t0\t1\n", ("column 2", "column 3"), [[1.0, None], [None, 0.0], [0.0, 1.0]]),
        (
            "smiles\tis toxic\tb\nCCO\t1\t1\nCC\t\t0\nC\t0\t\n",
            ("is toxic", "b"),
            [[1.0, 1.0], [None, 0.0], [0.0, None]],
        ),
        # Tabs that align the cells are blanks.
        ("CCO\t\t1\nCC\t0\nC\t\t1\n", ("column 2",), [[1.0], [0.0], [1.0]]),
        ("CCO\t\t1\nCC\t\t0\nC\t\t1\n", ("column 2",), [[1.0], [0.0], [1.0]]),
        ("CCO 1\tx\nCC 0\ty\nC 1\tx\n", ("column 2", "column 3"), [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]),
        ("# SMILES of a survey\nCCO 1\n#O 0\nCC 0\nC 1\n# end\n", ("column 2",), [[1.0], [0.0], [1.0]]),
        ("#smiles toxic\nCCO 1\nCC 0\nC 1\n", ("toxic",), [[1.0], [0.0], [1.0]]),
        ("\ufeffsmiles toxic\r\nCCO 1\r\nCC 0\r\nC 1\r\n", ("toxic",), [[1.0], [0.0], [1.0]]),
    ],
)
def test_labels_after_the_smiles(
    content: str, names: tuple[str, ...], expected: list[list[float | None] | None], tmp_path: Path
) -> None:
    file = tmp_path / "a.smi"
    file.write_text(content)
    molecules = read_table(file, missing=["nan"], kind="regression" if names[0] == "counts" else None)
    assert molecules.label_names == names
    assert molecules.smiles == ("CCO", "CC", "C")
    for graph, own in zip(molecules, expected, strict=True):
        if own is None:
            assert graph.y.isnan().tolist() == [[True, False]]
        else:
            assert [None if math.isnan(x) else x for x in graph.y[0].tolist()] == own


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("CCO 1\nCC 0 1\n", r"a\.smi, row 2: 3 columns, but the first line has 2; give a \.csv"),
        ("smiles y\nCCO 1\n\nCC ethyl alcohol\n", r"a\.smi, row 4: 3 columns, but the first line has 2; give a \.csv"),
        ("CCO\nCC\n", r"a\.smi: the lines hold only SMILES, but a task needs labels; add them, or give a \.csv"),
        (
            "CCO 5793\nCC 702\nC 297\n",
            r"no column other than 'smiles' has labels; ignored: 'column 2' \(whole numbers, which may be catalogue numbers\); "
            r"name the columns to predict with --labels",
        ),
        # One that repeats is not a label either: molecules have synonyms and salts.
        (
            "CCO 5793\nCC 702\nC 297\nCN 702\n",
            r"ignored: 'column 2' \(whole numbers, which may be catalogue numbers\)",
        ),
        (
            "CCO ethanol\nCC ethane\nC methane\n",
            r"no column other than 'smiles' has labels.*; name the columns to predict with --labels",
        ),
        (
            "mol y\nCCO 1\nCC 0\n",
            r"row 1: 'mol' is not a SMILES; correct it, or call it 'smiles' if the line names the columns",
        ),
        ("smiles y y\nCCO 1 0\nCC 0 1\n", r"a\.smi: the header names 'y' more than once; rename the columns"),
        ("# nothing\n", r"a\.smi: the file holds no molecule; give a file with at least one"),
        ("smiles y\n", r"a\.smi: the file holds no molecule; give a file with at least one"),
    ],
)
def test_files_whose_meaning_is_not_clear_are_refused(content: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "a.smi"
    file.write_text(content)
    with pytest.raises(DataError, match=sentence):
        read_table(file)


def test_numbers_of_a_catalogue_stand_beside_labels(tmp_path: Path) -> None:
    """The second column of a .smi file is the name of the molecule, by convention; a user can still name it as a label."""
    file = tmp_path / "a.smi"
    file.write_text("CCO 5793 1.5\nCC 702 2.5\nC 297 0\nCN 702 3\n")
    molecules = read_table(file)
    assert molecules.label_names == ("column 3",)
    assert [graph.y.tolist() for graph in molecules] == [[[1.5]], [[2.5]], [[0.0]], [[3.0]]]
    assert molecules.notes == (
        "not predicted: 'column 2' (whole numbers, which may be catalogue numbers); name a column with --labels to predict it",
    )
    assert [float(graph.y) for graph in read_table(file, labels=["column 2"])] == [5793, 702, 297, 702]
    # The same numbers with a name are labels.
    file.write_text("smiles count\nCCO 5793\nCC 702\nC 297\nCN 702\n")
    assert [float(graph.y) for graph in read_table(file)] == [5793, 702, 297, 702]


@pytest.mark.parametrize(
    ("content", "smiles"),
    [
        ("# of a survey\nsmiles name\nCCO ethyl alcohol\n#O water\nCC ethane\n", ["CCO", "CC"]),
        ("#SMILES name\nCCO ethanol\nCC ethane\n", ["CCO", "CC"]),
        ("name\tSMILES\nethyl alcohol\tCCO\nethane\tCC\n", ["CCO", "CC"]),
        ("id canonical_smiles\n7 CCO\n8 CC\n", ["CCO", "CC"]),
        # Not a header: the first word is a molecule, and "smiles-1" its name.
        ("CCO smiles-1\nCC smiles-2\n", ["CCO", "CC"]),
        # Rows that are not molecules stay, so that predictions tell why they have none.
        ("smiles\nCCO\nzz\n", ["CCO", "zz"]),
    ],
)
@pytest.mark.parametrize("suffix", [".smi", ".txt"])
def test_predictions_have_a_row_for_each_molecule_but_none_for_comments(
    content: str, smiles: list[str], suffix: str, tmp_path: Path
) -> None:
    file = tmp_path / f"a{suffix}"
    file.write_text(content)
    assert read_smiles(file) == smiles
    if "zz" not in smiles:
        assert list(read_corpus(file).smiles) == smiles


def test_comments_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.smi").write_text("# of a survey\nsmiles y\nCCO 1\n#O 0\nCC 0\n")
    molecules = read_table(tmp_path / "a.smi")
    assert (molecules.notes, molecules.rows) == (("lines of comments: 2",), (3, 5))


def test_a_corpus_of_the_same_file_has_its_smiles(tmp_path: Path) -> None:
    (tmp_path / "a.smi").write_text("CCO 1.5\nCC ethyl alcohol\n")
    assert read_corpus(tmp_path / "a.smi").smiles == ("CCO", "CC")
