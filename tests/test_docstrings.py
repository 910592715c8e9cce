"""Examples in docstrings: every one runs, and everything public has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import io
import pkgutil
from pathlib import Path
from types import ModuleType

import pytest
import torch

import mlopt

#: Modules whose examples need an extra, and what they import.
EXTRAS = {
    "mlopt.estimators.unrolled": "torchopt",
    "mlopt.recipes.tapweight.recipe": "rdkit",
    "mlopt.recipes.tapweight.molecules.predictor": "rdkit",
}


def module_names() -> list[str]:
    """Return every module of the package, without recipes whose extras are missing."""
    walked = pkgutil.walk_packages(mlopt.__path__, "mlopt.", onerror=lambda _: None)
    return [mlopt.__name__, *(module.name for module in walked)]


def imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if not name.startswith("mlopt.recipes."):
            raise
        pytest.skip(f"needs an extra: {error}")


def failures(name: str) -> str:
    """Run the examples of a module; return doctest's report of the failures."""
    report = io.StringIO()
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    for test in doctest.DocTestFinder(exclude_empty=True).find(
        imported(name), name, globs={"mlopt": mlopt, "torch": torch}
    ):
        runner.run(test, out=report.write)
    return report.getvalue()


@pytest.mark.parametrize("name", module_names())
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name in EXTRAS:
        pytest.importorskip(EXTRAS[name])
    failed = failures(name)
    assert not failed, failed


def public() -> list[str]:
    """Return the full names of the public classes and functions."""
    names = []
    for module in (mlopt, mlopt.linear, mlopt.estimators):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                names.append(f"{value.__module__}.{name}")
    return sorted(set(names))


@pytest.mark.parametrize("name", public())
def test_everything_public_has_an_example(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    shown = ">>> " in (getattr(importlib.import_module(module), attribute).__doc__ or "")
    assert shown, f"the docstring of {name} has no example"
