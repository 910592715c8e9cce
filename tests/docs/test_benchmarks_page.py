"""The page on benchmarks and the README report the committed results."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from benchmarks.hypergrad.bar import bar

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGE = (ROOT / "docs" / "benchmarks.md").read_text()
#: By section: the file, and the names of the tasks in the tables.
TAPWEIGHT = {
    "real molecules": ("tapweight-2026-11-24.json", {"bbbp": "BBBP", "esol": "ESOL"}),
    "real texts": (
        "tapweight-text-2026-11-24.json",
        {"citation_intent": "citation intent", "scicite": "SciCite", "chemprot": "ChemProt", "cola": "CoLA"},
    ),
}
LIBRARIES = {
    "hypertorch": "hypertorch",
    "betty": "Betty 0.2.1",
    "betty_head": "Betty, repository",
    "torchopt": "TorchOpt",
    "boat": "BOAT",
    "mlopt": "mlopt",
}


def rows_of(file: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / file).read_text())["rows"]


def table_of(text: str, header: str) -> list[list[str]]:
    """Return the cells of the rows below a header."""
    rows = text.split(f"{header}\n")[1].split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3f} ({statistics.stdev(values):.3f})"


def score_row(name: str, runs: list[dict[str, Any]]) -> str:
    cells = [spread([run["scores"][method]["test"] for run in runs]) for method in ("direct", "equal", "tapweight")]
    return f"| {name} | {runs[0]['metric']} | {' | '.join(cells)} |"


@pytest.fixture(scope="module")
def hypergrad() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = rows_of("hypergrad-2026-11-24.json")
    return rows


@pytest.mark.parametrize(("text", "least"), [(PAGE, 13), (README, 6)])
def test_errors_and_costs_of_hypergradients_are_the_measured_ones(
    text: str, least: int, hypergrad: list[dict[str, Any]]
) -> None:
    table = table_of(text, "| | error, MLP | time | memory | error, transformer | time | memory |")
    assert len(table) >= least
    for name, *cells in table:
        library, estimator = name.split(": ")
        expected = []
        for case in ("MLP 784-256-10", "transformer"):
            (row,) = (
                row
                for row in hypergrad
                if (row["section"], row.get("case"), row.get("estimator")) == ("accuracy", case, estimator)
                and LIBRARIES.get(row["library"]) == library
                and row["iterations"] in (0, 10)
            )
            expected += [f"{row['error']:.1e}", f"{row['time']:.1f}", f"{row['memory']:.2f}"]
        assert cells == expected, name


def test_targets_at_equal_iterations_are_the_measured_ones(hypergrad: list[dict[str, Any]]) -> None:
    figures = {target: figure for target, figure, _ in bar(hypergrad)}
    table = table_of(PAGE, "| | CG, time | CG, memory | Neumann, time | Neumann, memory |")
    assert len(table) == 5
    for case, *cells in table:
        assert cells == [
            figures[f"2 {family}, 10 iterations, {case}: {cost} relative to the best equally accurate library <= 1"]
            for family in ("ConjugateGradient", "Neumann")
            for cost in ("time", "memory")
        ]


def test_the_other_targets_and_the_number_of_targets_met(hypergrad: list[dict[str, Any]]) -> None:
    checks = bar(hypergrad)
    other = [
        [target[2:], figure, "met" if met else "not met"]
        for target, figure, met in checks
        if not target.startswith("2 ")
    ]
    assert table_of(PAGE, "| | figure | |") == other
    met = sum(met is True for _, _, met in checks)
    assert f"mlopt meets {met} of the {len(checks)} targets" in README


def test_the_cost_of_solve() -> None:
    table = table_of(PAGE, "| loop | `solve` / by hand | target: at most | |")
    expected = [
        [f"{row['ratio']:.2f}", f"{row['asked']}", "met" if row["ratio"] <= row["asked"] else "not met"]
        for row in rows_of("engine-2026-11-24.json")
    ]
    assert [cells for _, *cells in table] == expected


@pytest.fixture(params=list(TAPWEIGHT))
def section(request: Any) -> tuple[str, dict[str, Any], dict[str, str]]:
    """Return a section of the page, the results, and the names of the tasks."""
    file, names = TAPWEIGHT[request.param]
    return PAGE.split(f"## TapWeight: {request.param}\n")[1].split("\n##")[0], rows_of(file), names


def runs_of(rows: dict[str, Any], task: str) -> list[dict[str, Any]]:
    return [row for row in rows["runs"] if row["task"] == task]


def test_scores_are_those_of_the_results(section: Any) -> None:
    text, rows, names = section
    assert {row["task"] for row in rows["runs"]} == set(names)
    for task, name in names.items():
        runs = runs_of(rows, task)
        assert len(runs) == len(rows["size"]["seeds"])
        assert score_row(name, runs) in text.splitlines()
        assert score_row(name, runs) in README.splitlines()


def test_scores_of_the_demonstration_in_the_readme() -> None:
    assert score_row("demonstration", rows_of("demo-2026-11-24.json")) in README.splitlines()


def test_weights_and_their_significance(section: Any) -> None:
    text, rows, names = section
    for objective in rows["runs"][0]["weights"]:
        cells = [
            f"{spread([run['weights'][objective] for run in runs])}; "
            f"{sum(run['signals'][objective]['significant'] for run in runs)} of {len(runs)}"
            for runs in (runs_of(rows, task) for task in names)
        ]
        assert f"| {objective} | {' | '.join(cells)} |" in text.splitlines()


def test_cost_of_an_iteration(section: Any) -> None:
    text, rows, _ = section
    cost = f"{rows['cost']['1']:.2f} with lambda moved at every step, {rows['cost']['4']:.2f} at every fourth"
    assert cost in " ".join(text.split())


def test_every_measurement_in_a_table_of_the_readme_is_on_the_page() -> None:
    """The row of the demonstration has a table of its own on the page."""
    rows = [row for row in README.splitlines() if re.match(r"\|.*\d\.\d", row)]
    assert len(rows) > 12
    assert set(rows) - set(PAGE.splitlines()) <= {score_row("demonstration", rows_of("demo-2026-11-24.json"))}
    assert len(README.splitlines()) < 150
