"""Recipes: complete methods built on mlopt, importable as `mlopt.recipes`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if __name__ == "recipes":
    raise ImportError(
        "import it as `mlopt.recipes`: the folder `recipes` is packed inside mlopt, and is no package of its own"
    )

from mlopt.imports import import_lazily

if TYPE_CHECKING:
    from .tapweight.recipe import TapWeight as TapWeight

__all__ = ["TapWeight"]

__getattr__ = import_lazily(__name__, {"tapweight.recipe": ("TapWeight",)})
