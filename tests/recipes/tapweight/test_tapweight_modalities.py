"""The same levels serve every modality: the common code does not depend on any of them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlopt.recipes import tapweight

FOLDER = Path(tapweight.__file__).parent
COMMON = sorted(str(path.relative_to(FOLDER)) for part in (".", "methods") for path in (FOLDER / part).glob("*.py"))
#: Words of code that depends on a modality.
WORDS = r"molecul|smiles|graph|atom|token|sentence|embedding|transformers|torch_geometric|rdkit"


def imported(file: Path) -> set[str]:
    """Return the modules that a file imports, relative ones with their dots."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            stem = "." * node.level + (node.module or "")
            names |= {stem} | {f"{stem.rstrip('.')}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("name", COMMON)
def test_common_code_does_not_import_a_modality(name: str) -> None:
    modality = re.compile(
        r"(^|\.)(molecules|text)(\.|$)|torch_geometric|rdkit|sklearn|transformers|tokenizers|datasets"
    )
    assert not list(filter(modality.search, imported(FOLDER / name)))


@pytest.mark.parametrize("name", [name for name in COMMON if name.startswith("methods")])
def test_the_methods_do_not_name_a_modality(name: str) -> None:
    assert not re.findall(WORDS, (FOLDER / name).read_text(), re.IGNORECASE)


def test_the_checked_files_exist() -> None:
    assert {"methods/levels.py", "methods/fixed.py", "command.py", "configuration.py", "recipe.py"} <= set(COMMON)
    assert imported(FOLDER / "text" / "encoder.py") >= {"transformers"}


# Not transformers for molecules: torchmetrics imports it if it is installed.
@pytest.mark.parametrize(
    ("modality", "others"), [("text", ("torch_geometric", "rdkit", "sklearn")), ("molecules", ("datasets",))]
)
def test_one_modality_does_not_need_the_packages_of_the_other(modality: str, others: tuple[str, ...]) -> None:
    missing = "; ".join(f"sys.modules[{name!r}] = None" for name in others)
    code = f"import sys; {missing}; import mlopt.recipes.tapweight.{modality}.modality as m; print(m.main.args[0].name)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == f"{modality}\n", done.stderr
