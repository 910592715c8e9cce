"""Recipes: complete methods built on mlopt, each imported when it is first used."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .tapweight.recipe import TapWeight as TapWeight

__all__ = ["TapWeight"]

_HOMES = {"TapWeight": ".tapweight.recipe"}

# A wheel holds the recipes beside this file; a checkout and a source distribution hold them in `recipes/` at the top level.
_TOP_LEVEL = Path(__file__).parents[2] / "recipes"
if (_TOP_LEVEL / "tapweight").is_dir():
    __path__.append(str(_TOP_LEVEL))


def __getattr__(name: str) -> Any:
    """Import a recipe by its name."""
    if name not in _HOMES:
        raise AttributeError(f"mlopt.recipes has no recipe {name!r}; it has {', '.join(_HOMES)}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)
