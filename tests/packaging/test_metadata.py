"""The files beside the code say what pyproject.toml says."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


def test_the_workflow_runs_each_declared_python() -> None:
    matrix = load(".github/workflows/ci.yml")["jobs"]["versions"]["strategy"]["matrix"]
    prefix = "Programming Language :: Python :: 3."
    declared = [name.split()[-1] for name in PROJECT["classifiers"] if name.startswith(prefix)]
    assert matrix["python"] == declared
    assert PROJECT["requires-python"] == f">={declared[0]}"
    assert [entry["python"] for entry in matrix["include"]] == declared[:1]


def test_the_citation_is_of_this_version() -> None:
    citation = load("CITATION.cff")
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert citation["authors"] == PROJECT["authors"]
