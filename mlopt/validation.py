"""Checks on arguments, as attrs validators: each error names the argument, the value and what it may be."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import attrs

from .errors import ArgumentError

__all__ = ["at_least", "one_of", "positive", "positive_or_none", "shown"]

Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]

_LARGEST_WHOLE = 2**63 - 1  # torch's
_LONGEST_SHOWN = 200


def shown(value: object) -> str:
    """Return a value as an error shows it, cut off where it is long: a file can hold anything."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # more digits than Python writes, or lists in lists too deep
        return f"<{type(value).__name__} too large to be shown>"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def at_least(bound: float) -> Validator:
    """Return a validator for finite numbers not below `bound`."""

    def check(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        whole = isinstance(bound, int) and attribute.type in (int, "int")
        good = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        most = _LARGEST_WHOLE if whole else sys.float_info.max
        if not good or not bound <= value <= most:
            kind = "a whole number" if whole else "a finite number"
            limits = f">= {bound}{' and < 2**63' if whole and good and value > most else ''}"
            raise ArgumentError(
                f"{type(instance).__name__}: {attribute.name}={shown(value)}; it must be {kind} {limits}"
            )

    return check


def positive(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    """Accept finite numbers above zero."""
    if not _is_positive(value):
        raise ArgumentError(
            f"{type(instance).__name__}: {attribute.name}={shown(value)}; it must be a finite number > 0"
        )


def positive_or_none(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    """Accept None and finite numbers above zero."""
    if value is not None and not _is_positive(value):
        raise ArgumentError(
            f"{type(instance).__name__}: {attribute.name}={shown(value)}; it must be a finite number > 0, or None"
        )


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def one_of(*values: object) -> Validator:
    """Return a validator for a fixed set of values."""

    def check(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        if value not in values:
            raise ArgumentError(
                f"{type(instance).__name__}: {attribute.name}={shown(value)}; it must be one of {', '.join(map(repr, values))}"
            )

    return check
