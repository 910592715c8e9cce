"""Checks on arguments, as attrs validators: each error names the argument, its value and the values it may have."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import attrs
from torch import Tensor

from .errors import ArgumentError

__all__ = [
    "at_least",
    "batches_or_none",
    "boolean",
    "is_positive",
    "is_whole",
    "must_be",
    "one_of",
    "positive",
    "positive_or_none",
    "require",
    "share",
    "shown",
]

Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]

_LARGEST_WHOLE = 2**63 - 1  # torch's
_LONGEST_SHOWN = 200


def shown(value: object) -> str:
    """Return the `repr` of a value for a message, cut off after 200 characters: values from a file can be of any size."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer with too many digits for Python, or too deeply nested lists
        return f"<{type(value).__name__} too large to be shown>"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def is_whole(value: object, least: float = -math.inf) -> bool:
    """Return whether a value is an integer, not a bool, and at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_positive(value: object) -> bool:
    """Return whether a value is a finite number above zero, not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def require(owner: str, name: str, value: object, accepted: bool, description: str) -> None:
    """Raise an ArgumentError if an argument of a class or function was not accepted; `description` is what it must be."""
    if not accepted:
        raise ArgumentError(f"{owner}: {name}={shown(value)}; it must be {description}")


def must_be(accepts: Callable[[Any], bool], description: str) -> Validator:
    """Return a validator that accepts some values.

    Args:
        accepts: returns whether a value is accepted.
        description: the accepted values, for the message.
    """

    def check(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        require(type(instance).__name__, attribute.name, value, accepts(value), description)

    return check


def at_least(bound: float) -> Validator:
    """Return a validator that accepts finite numbers >= `bound`; only whole numbers if the bound is an int."""

    def check(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        whole = isinstance(bound, int)
        number = is_whole(value) if whole else isinstance(value, (int, float)) and not isinstance(value, bool)
        most = _LARGEST_WHOLE if whole else sys.float_info.max
        limit = " and < 2**63" if whole and number and value > most else ""
        description = f"a {'whole' if whole else 'finite'} number >= {bound:g}{limit}"
        require(type(instance).__name__, attribute.name, value, number and bound <= value <= most, description)

    return check


boolean = must_be(lambda value: isinstance(value, bool), "True or False")
positive = must_be(is_positive, "a finite number > 0")
share = must_be(lambda value: value == 0 or (is_positive(value) and value < 1), "a number >= 0 and < 1")
positive_or_none = must_be(lambda value: value is None or is_positive(value), "a finite number > 0, or None")


batches_or_none = must_be(
    lambda value: value is None or (isinstance(value, Iterable) and not isinstance(value, (Iterator, Tensor))),
    "batches that can be iterated repeatedly, such as a DataLoader or a list, or None",
)


def one_of(*values: object) -> Validator:
    """Return a validator that accepts a fixed set of values."""
    return must_be(lambda value: value in values, f"one of {', '.join(map(repr, values))}")
