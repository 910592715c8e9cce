"""Look up entries by name; errors list the known names and suggest the closest."""

from __future__ import annotations

import difflib
import itertools
from typing import TYPE_CHECKING, TypeVar

from mlopt.errors import ArgumentError
from mlopt.validation import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["chosen", "distinct", "suggestion"]

T = TypeVar("T")


def chosen(kind: str, name: str, known: Mapping[str, T]) -> T:
    """Return the entry of a name.

    Args:
        kind: a word for the entries, for the error.
        name: the name.
        known: the entries by name.

    Raises:
        ValueError: the name is unknown; the message lists the known names.
    """
    if name not in known:
        raise ArgumentError(f"there is no {kind} {shown(name)}{suggestion(name, known)}")
    return known[name]


def distinct(names: Iterable[str]) -> list[str]:
    """Return names for the columns of a table: a name that stands before gets the next free number, as in "a", "a_2"."""
    given: list[str] = []
    for name in names:
        free = (f"{name}_{k}" for k in itertools.count(2))
        given.append(name if name not in given else next(other for other in free if other not in given))
    return given


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return the end of an error about an unknown name: the known names, and the closest."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; available: {', '.join(map(shown, known))}{f' (did you mean {shown(close[0])}?)' if close else ''}"
