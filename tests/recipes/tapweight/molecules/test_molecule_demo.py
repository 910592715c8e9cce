"""The demonstration: its molecules, its label, and its report of the results."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from mlopt.recipes.tapweight.demonstration import conclusion, summary
from mlopt.recipes.tapweight.molecules import demo
from mlopt.recipes.tapweight.molecules.sample import drugs, recombined
from mlopt.recipes.tapweight.significance import Signal


def test_every_drug_is_a_molecule():
    from rdkit import Chem

    assert [smiles for smiles in drugs() if Chem.MolFromSmiles(smiles) is None] == []


def test_recombined_molecules_are_distinct_and_repeatable():
    from rdkit import Chem

    first = recombined(300, 0)
    assert first == recombined(300, 0)
    assert first != recombined(300, 1)
    assert len(set(first)) == 300
    sizes = [Chem.MolFromSmiles(smiles).GetNumHeavyAtoms() for smiles in first]
    assert min(sizes) >= 12
    assert max(sizes) <= 37
    # Whole molecules: no open end is left.
    assert not [smiles for smiles in first if "*" in smiles]
    with pytest.raises(ValueError, match="the halves make"):
        recombined(10**9, 0)


def test_the_solubilities_are_those_of_esol():
    """The size, the mean and the range of the measured labels as MoleculeNet has them; ethane and benzene."""
    rows = demo.solubilities()
    labels = [label for _, label in rows]
    assert len(rows) == 1_128
    assert sum(labels) / len(labels) == pytest.approx(-3.050, abs=1e-3)
    assert (min(labels), max(labels)) == (-11.6, 1.58)
    assert dict(rows)["CC"] == pytest.approx(-1.36)
    assert dict(rows)["c1ccccc1"] == pytest.approx(-1.64)


@pytest.fixture
def results():
    """The committed runs that the page on benchmarks reports."""
    file = Path(__file__).parents[4] / "benchmarks" / "results" / "demo-2026-11-26.json"
    rows = json.loads(file.read_text())["rows"]
    return [
        SimpleNamespace(
            weights=row["weights"],
            scores=row["scores"],
            metric=row["metric"],
            greater_is_better=False,
            signals={name: Signal(**signal) for name, signal in row["signals"].items()},
            main=SimpleNamespace(title="TapWeight by rehearsal", scores=row["scores"]["rehearsal"]),
        )
        for row in rows
    ]


def test_the_page_reports_the_runs(results):
    page = " ".join((Path(__file__).parents[4] / "docs" / "benchmarks.md").read_text().split())
    sentence = conclusion(results, demo.KNOWN)
    for part in (
        "0.125 in 10 of 10 runs",
        "largest weight in 10 of 10",
        "equal weights in 10 of 10",
        "finetuning in 10 of 10",
    ):
        assert part in sentence
    assert "significant in 10 of 10" in sentence
    assert "below its equal share in 10 of 10 runs, `polarity` on top in 10 of 10" in page
    assert all(result.signals["polarity"].significant for result in results)
    assert not any(result.signals["random_labels"].significant for result in results)
    console = Console(file=io.StringIO(), width=120)
    for table in summary(results):
        console.print(table)
    for row in console.file.getvalue().splitlines():
        cells = [cell.strip() for cell in row.strip("│ ").split("│")]
        if row.startswith("│"):
            assert "| " + " | ".join(cells) + " |" in page
