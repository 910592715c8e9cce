"""The folders of the tests mirror the packages."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
#: These test what is not inside a package of ours.
OTHERS = {"benchmarks", "docs", "packaging"}
FOLDERS = {file.parent.relative_to(TESTS) for file in TESTS.rglob("test_*.py")} - {Path(), *map(Path, OTHERS)}


def package_of(folder: Path) -> Path:
    return TESTS.parent / (folder if folder.parts[0] == "recipes" else "mlopt" / folder)


@pytest.mark.parametrize("folder", sorted(FOLDERS), ids=str)
def test_a_folder_of_tests_names_a_package_or_a_module(folder: Path) -> None:
    package = package_of(folder)
    assert (package / "__init__.py").is_file() or package.with_suffix(".py").is_file()


def test_there_are_folders() -> None:
    assert {"linear", "recipes/tapweight/text"} <= set(map(Path.as_posix, FOLDERS))


def test_each_file_of_tests_has_a_name_of_its_own() -> None:
    """The folders are no packages: pytest imports a file by its name alone, and refuses a second one."""
    names = Counter(file.name for file in TESTS.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
