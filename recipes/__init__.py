"""Recipes: complete methods built on mlopt, importable as `mlopt.recipes`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if __name__ == "recipes":
    raise ImportError(
        "import it as `mlopt.recipes`: the folder `recipes` is packed inside mlopt, and is no package of its own"
    )

if TYPE_CHECKING:
    from .tapweight.recipe import TapWeight as TapWeight

__all__ = ["TapWeight"]

_HOMES = {"TapWeight": ".tapweight.recipe"}


def __getattr__(name: str) -> Any:
    """Import a recipe when it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"mlopt.recipes has no recipe {name!r}; it has {', '.join(_HOMES)}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)
