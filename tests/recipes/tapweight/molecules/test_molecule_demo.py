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
from mlopt.recipes.tapweight.molecules.sample import drugs, recombined, solubility
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


def test_solubility_is_delaneys_equation():
    """Benzene: logP 1.6866, weight 78.114, no rotatable bond, all atoms aromatic."""
    expected = 0.16 - 0.63 * 1.6866 - 0.0062 * 78.114 - 0.74
    assert solubility("c1ccccc1") == pytest.approx(expected, abs=1e-4)
    # Butane: logP 1.8064, weight 58.124, one rotatable bond.
    assert solubility("CCCC") == pytest.approx(0.16 - 0.63 * 1.8064 - 0.0062 * 58.124 + 0.066, abs=1e-4)


@pytest.fixture
def results():
    """The committed runs that the page on benchmarks reports."""
    file = Path(__file__).parents[4] / "benchmarks" / "results" / "demo-2026-11-24.json"
    rows = json.loads(file.read_text())["rows"]
    return [
        SimpleNamespace(
            weights=row["weights"],
            scores=row["scores"],
            metric=row["metric"],
            greater_is_better=False,
            signals={name: Signal(**signal) for name, signal in row["signals"].items()},
        )
        for row in rows
    ]


def test_the_page_reports_the_runs(results):
    page = " ".join((Path(__file__).parents[4] / "docs" / "benchmarks.md").read_text().split())
    sentence = conclusion(results, demo.KNOWN)
    for part in ("0.167 in 10 of 10 runs", "on top in 6 of 10", "equal weights in 10 of 10", "finetuning in 10 of 10"):
        assert part in sentence
    assert "significant in 0 of 10" in sentence
    assert "below its equal share in 10 of 10 runs, `descriptors` on top in 6 of 10" in page
    console = Console(file=io.StringIO(), width=120)
    for table in summary(results):
        console.print(table)
    for row in console.file.getvalue().splitlines():
        cells = [cell.strip() for cell in row.strip("│ ").split("│")]
        if row.startswith("│"):
            assert "| " + " | ".join(cells) + " |" in page
