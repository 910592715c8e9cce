"""The examples in the docstrings of the diagnosis and of mlopt.testing run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import mlopt
import mlopt.diagnosis
import mlopt.testing

MODULES = [
    f"{package.__name__}.{module.name}"
    for package in (mlopt.diagnosis, mlopt.testing)
    for module in pkgutil.iter_modules(package.__path__)
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), extraglobs={"mlopt": mlopt})
    assert result.failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    counts = {name: sum(bool(test.examples) for test in finder.find(importlib.import_module(name))) for name in MODULES}
    with_examples = ("check", "diagnosis", "minimize", "spectrum")
    for name in (*(f"diagnosis.{part}" for part in with_examples), "testing.contract"):
        assert counts[f"mlopt.{name}"] > 0, name
