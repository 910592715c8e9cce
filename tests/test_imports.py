"""Optional dependencies and lazy exports."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mlopt import MissingDependencyError
from mlopt.imports import import_lazily, import_optional


def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    sentence = r"^A test needs nowhere_at_all, which is not installed: pip install 'mlopt-torch\[test\]'$"
    with pytest.raises(MissingDependencyError, match=sentence) as caught:
        import_optional("nowhere_at_all.inner", "A test", "'mlopt-torch[test]'")
    assert isinstance(caught.value, ImportError)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("import nowhere_at_all", "needs nowhere_at_all, which is not installed"),
        ("from math import nowhere", r"needs math, which cannot be imported \(cannot import name 'nowhere'"),
        ("raise ImportError('too old')", r"needs broken_package, which cannot be imported \(too old\)"),
    ],
)
def test_a_package_that_cannot_be_imported_is_reported_with_the_reason(
    content: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_package.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError, match=sentence):
        import_optional("broken_package", "A test", "it")
    sys.modules.pop("broken_package", None)


def test_a_misspelt_module_of_mlopt_is_a_fault_of_the_program() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'mlopt\.nowhere'") as caught:
        import_optional("mlopt.nowhere", "A test", "it")
    assert not isinstance(caught.value, MissingDependencyError)


def test_a_lazy_package_imports_a_name_on_first_use() -> None:
    get = import_lazily("json", {"decoder": ("JSONDecoder",), "encoder": ("JSONEncoder", "c_make_encoder")})
    assert get("JSONEncoder") is sys.modules["json.encoder"].JSONEncoder  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"^json has no 'dumps'; it has JSONDecoder, JSONEncoder, c_make_encoder$"):
        get("dumps")
