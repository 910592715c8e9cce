"""Choosing by name, and errors that suggest the closest name there is."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, TypeVar

from mlopt.errors import ArgumentError
from mlopt.validation import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["chosen", "suggestion"]

T = TypeVar("T")


def chosen(kind: str, name: str, known: Mapping[str, T]) -> T:
    """Return the entry of a name.

    Args:
        kind: what the entries are, for the error.
        name: the name.
        known: the entries by name.

    Raises:
        ValueError: there is no such name; the message lists the names there are.
    """
    if name not in known:
        raise ArgumentError(f"there is no {kind} {shown(name)}{suggestion(name, known)}")
    return known[name]


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return the end of an error about an unknown name: the names there are, and the closest."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; there are {', '.join(map(shown, known))}{f' - did you mean {shown(close[0])}?' if close else ''}"
