"""The tables of the README on TapWeight are those of the committed results."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
#: The section, the file, and the names that the README gives the tasks.
PARTS = {
    "Real molecules": ("tapweight-2026-11-24.json", {"bbbp": "BBBP", "esol": "ESOL"}),
    "Real texts": (
        "tapweight-text-2026-11-24.json",
        {"citation_intent": "citation intent", "scicite": "SciCite", "chemprot": "ChemProt", "cola": "CoLA"},
    ),
}


def spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3f} ({statistics.stdev(values):.3f})"


@pytest.fixture(params=list(PARTS))
def part(request: Any) -> tuple[list[str], dict[str, Any], dict[str, str]]:
    """Give the lines of a section, the results, and the names of the tasks."""
    file, names = PARTS[request.param]
    section = README.split(f"### {request.param}\n")[1].split("\n##")[0]
    return section.splitlines(), json.loads((ROOT / "benchmarks" / "results" / file).read_text())["rows"], names


def runs(rows: dict[str, Any], task: str) -> list[dict[str, Any]]:
    return [row for row in rows["runs"] if row["task"] == task]


def test_scores(part: Any) -> None:
    lines, rows, names = part
    assert {row["task"] for row in rows["runs"]} == set(names)
    for task, name in names.items():
        own = runs(rows, task)
        assert len(own) == len(rows["size"]["seeds"])
        cells = [spread([row["scores"][way]["test"] for row in own]) for way in ("direct", "equal", "tapweight")]
        assert f"| {name} | {own[0]['metric']} | {' | '.join(cells)} |" in lines


def test_weights_and_their_significance(part: Any) -> None:
    lines, rows, names = part
    for objective in rows["runs"][0]["weights"]:
        cells = [
            f"{spread([row['weights'][objective] for row in own])}; "
            f"{sum(row['signals'][objective]['significant'] for row in own)} of {len(own)}"
            for own in (runs(rows, task) for task in names)
        ]
        assert f"| {objective} | {' | '.join(cells)} |" in lines


def test_cost(part: Any) -> None:
    lines, rows, _ = part
    text = " ".join(lines)
    assert f"{rows['cost']['1']:.2f} with lambda moved at every step, {rows['cost']['4']:.2f} at every fourth" in text
