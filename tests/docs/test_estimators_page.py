"""The page on estimators: its code runs unchanged, and its example estimators fulfil the contract."""

from __future__ import annotations

import contextlib
import io
import json
import re
import unittest
from pathlib import Path
from typing import Any

import pytest

import mlopt
from mlopt.testing import EstimatorContract

PAGE = Path(__file__).parents[2] / "docs" / "estimators.md"


@pytest.fixture(scope="module")
def page() -> tuple[dict[str, Any], str]:
    """Run the code blocks of the page in order; return their names and their output."""
    names: dict[str, Any] = {"__name__": "page"}
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
            exec(compile(block, str(PAGE), "exec"), names)
    return names, output.getvalue()


def test_its_code_runs_and_prints_tables(page: tuple[dict[str, Any], str]) -> None:
    _, output = page
    assert "The linear solve of 'regression' did not converge" in output
    assert output.count("hypergradient of 'weights' against 'dense'") == 2
    assert output.count("hypergradient of 'weights' against 'resolve'") == 1
    assert "safe to run" in output


@pytest.mark.parametrize("name", ["TestSteepestDescent", "TestTwoJacobiSweeps"])
def test_its_estimators_fulfil_the_contract(name: str, page: tuple[dict[str, Any], str]) -> None:
    contract = page[0][name]()
    laws = [law for law in dir(contract) if law.startswith("test_")]
    assert isinstance(contract, EstimatorContract)
    assert len(laws) > 12
    for law in laws:
        with contextlib.suppress(unittest.SkipTest):
            getattr(contract, law)()


def test_its_tables_name_public_estimators(page: tuple[dict[str, Any], str]) -> None:
    """Every call in the tables is a valid call of a public name of mlopt."""
    calls = re.findall(r"`([A-Z]\w+)\(([^`.]*)\)`", PAGE.read_text().split("## Check an estimator")[0])
    assert len(calls) > 6
    for name, arguments in calls:
        eval(f"mlopt.{name}({arguments})", {"mlopt": mlopt})


def test_errors_and_times_of_kfac_are_the_measured_ones() -> None:
    rows = json.loads((PAGE.parents[1] / "benchmarks" / "results" / "kfac-2026-11-27.json").read_text())["rows"]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    header = (
        "| | iterations | MLP: error | time | softmax: error | time | GIN: error | time | transformer: error | time |"
    )
    lines = PAGE.read_text().split(f"{header}\n")[1].split("\n\n")[0].splitlines()[1:]
    assert len(lines) >= 8
    for line in lines:
        name, iterations, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        expected = []
        for case in cases:
            key = (case, name, int(iterations))
            (row,) = (row for row in rows if (row["case"], row["estimator"], row["iterations"]) == key)
            expected += [f"{row['error']:.1e}", f"{row['time']:.0f}"]
        assert cells == expected, line
