"""Imports that wait until they are needed: of optional dependencies, and of a package's own modules; and the version."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .errors import MissingDependencyError

__all__ = ["import_lazily", "import_optional", "installed_version"]


def import_optional(module: str, user: str, requirement: str) -> Any:
    """Import a module that may be missing, or that imports one that may be missing.

    Args:
        module: its dotted name.
        user: what needs it, for the message.
        requirement: what to pass to `pip install`, quoted for a shell.

    Returns:
        The module.

    Raises:
        MissingDependencyError: a package outside mlopt cannot be imported.

    Example:
        >>> from mlopt.imports import import_optional
        >>> import_optional("math", "This example", "nothing").sqrt(4.0)
        2.0
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = (error.name or module).partition(".")[0]
        if package == __package__:
            raise
        missing = isinstance(error, ModuleNotFoundError)
        reason = "which is not installed" if missing else f"which cannot be imported ({error})"
        raise MissingDependencyError(f"{user} needs {package}, {reason}: pip install {requirement}") from error


def import_lazily(package: str, exports: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package that imports each public name on first use.

    Args:
        package: the package's `__name__`.
        exports: for each of its modules, the names that the package exports.
    """
    homes = {name: module for module, names in exports.items() for name in names}

    def __getattr__(name: str) -> Any:  # noqa: N807
        if name not in homes:
            raise AttributeError(f"{package} has no {name!r}; it has {', '.join(homes)}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return __getattr__


def installed_version() -> str:
    """Return the version of mlopt, or "not installed" if it runs from a source tree."""
    try:
        return importlib.metadata.version("mlopt-torch")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
