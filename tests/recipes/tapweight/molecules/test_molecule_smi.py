"""Labelled .smi files: with and without names of the columns; the ones whose meaning is not clear are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlopt.recipes.tapweight.files import DataError
from mlopt.recipes.tapweight.molecules import read_corpus, read_table


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
    ],
)
def test_labels_after_the_smiles(
    content: str, names: tuple[str, ...], expected: list[list[float] | None], tmp_path: Path
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
            assert graph.y[0].tolist() == own


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("CCO 1\nCC 0 1\n", r"a\.smi, row 2: 3 columns, but the first line has 2; give a \.csv"),
        ("smiles y\nCCO 1\n\nCC ethyl alcohol\n", r"a\.smi, row 4: 3 columns, but the first line has 2; give a \.csv"),
        ("CCO\nCC\n", r"a\.smi: nothing after the SMILES, and a task needs labels; add them, or give a \.csv"),
        (
            "CCO 5793\nCC 702\nC 297\n",
            r"column 2 holds different whole numbers, which may be labels or numbers of a catalogue; name the columns in a first "
            r"line, such as 'smiles name label'",
        ),
        (
            "CCO ethanol\nCC ethane\nC methane\n",
            r"no column of labels beside 'smiles'.*; name the columns to predict by --labels",
        ),
        ("smiles y\n", r"a\.smi: no molecule; give a file with at least one example"),
    ],
)
def test_files_whose_meaning_is_not_clear_are_refused(content: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "a.smi"
    file.write_text(content)
    with pytest.raises(DataError, match=sentence):
        read_table(file)


def test_a_corpus_of_the_same_file_has_its_smiles(tmp_path: Path) -> None:
    (tmp_path / "a.smi").write_text("CCO 1.5\nCC ethyl alcohol\n")
    assert read_corpus(tmp_path / "a.smi").smiles == ("CCO", "CC")
