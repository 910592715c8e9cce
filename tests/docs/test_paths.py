"""Every path that the documentation names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def paths(page: Path) -> set[str]:
    return {
        name.rstrip(".") for name in re.findall(r"\b(?:mlopt|recipes|tests|docs|benchmarks)/[\w./-]*", page.read_text())
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_paths_exist(page: Path) -> None:
    assert [name for name in sorted(paths(page)) if not (ROOT / name).exists()] == []


def test_the_design_names_most_of_the_core() -> None:
    named = paths(ROOT / "docs" / "design.md")
    parts = {
        f"mlopt/{part.name}{'/' * part.is_dir()}" for part in (ROOT / "mlopt").iterdir() if part.name[0] not in "_."
    }
    assert parts - named == {"mlopt/py.typed"}
