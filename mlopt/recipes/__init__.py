"""Recipes: complete methods built on mlopt, each imported when it is first used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..imports import import_lazily

if TYPE_CHECKING:
    from .tapweight.recipe import TapWeight as TapWeight

__all__ = ["TapWeight"]

# A wheel holds the recipes beside this file; a checkout and a source distribution hold them in `recipes/` at the top level.
_TOP_LEVEL = Path(__file__).parents[2] / "recipes"
if (_TOP_LEVEL / "tapweight").is_dir():
    __path__.append(str(_TOP_LEVEL))

__getattr__ = import_lazily(__name__, {"tapweight.recipe": ("TapWeight",)})
