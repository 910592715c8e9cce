"""Every option that a message of the recipes names exists on the command line."""

from __future__ import annotations

import re
from pathlib import Path

import attrs
import pytest

from mlopt.recipes.tapweight import configuration
from mlopt.recipes.tapweight.molecules.modality import MoleculeConfiguration
from mlopt.recipes.tapweight.text.modality import TextConfiguration

RECIPES = Path(configuration.__file__).parent
#: Option groups that belong to one modality, by the folder of their messages.
MODALITIES = {"molecules": MoleculeConfiguration, "text": TextConfiguration}
#: Options of every command, other names of --seeds and --labels, options of `predict`, an option of pip, and prefixes.
OTHERS = {
    *("--resume", "--overwrite", "--plan", "--config", "--help"),
    *("--seed", "--label", "--input", "--columns", "--no-deps"),
    *("--no", "--tyro"),
}


def options_of(kind: type) -> set[str]:
    names = set()
    for field in attrs.fields(attrs.resolve_types(kind)):
        own = attrs.fields_dict(field.type) if attrs.has(field.type) else [field.name]
        names |= {f"--{name.replace('_', '-')}" for name in own}
    return names


@pytest.mark.parametrize("file", sorted(RECIPES.rglob("*.py")), ids=lambda file: str(file.relative_to(RECIPES)))
def test_remedies_are_options(file: Path) -> None:
    part = file.relative_to(RECIPES).parts[0]
    kinds = [MODALITIES[part]] if part in MODALITIES else list(MODALITIES.values())
    known = OTHERS | set.intersection(*map(options_of, kinds))
    text = "\n".join(line for line in file.read_text().splitlines() if not line.strip().startswith("#"))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text))
    unknown = {name for name in named if name not in known and f"--{name.removeprefix('--no-')}" not in known}
    assert not unknown
