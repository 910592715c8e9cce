"""Checks on arguments, as attrs validators: each error names the argument, the value and what it may be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import attrs

__all__ = ["at_least", "one_of", "positive", "positive_or_none"]

Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def at_least(bound: float) -> Validator:
    """Return a validator for finite numbers not below `bound`."""

    def check(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        whole = isinstance(bound, int) and attribute.type in (int, "int")
        good = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not good or not math.isfinite(value) or value < bound:
            kind = "a whole number" if whole else "a finite number"
            raise ValueError(f"{type(instance).__name__}: {attribute.name}={value!r}; it must be {kind} >= {bound}")

    return check


def positive(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    """Accept finite numbers above zero."""
    if not _is_positive(value):
        raise ValueError(f"{type(instance).__name__}: {attribute.name}={value!r}; it must be a finite number > 0")


def positive_or_none(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    """Accept None and finite numbers above zero."""
    if value is not None and not _is_positive(value):
        raise ValueError(
            f"{type(instance).__name__}: {attribute.name}={value!r}; it must be a finite number > 0, or None"
        )


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def one_of(*values: object) -> Validator:
    """Return a validator for a fixed set of values."""

    def check(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        if value not in values:
            raise ValueError(
                f"{type(instance).__name__}: {attribute.name}={value!r}; it must be one of {', '.join(map(repr, values))}"
            )

    return check
