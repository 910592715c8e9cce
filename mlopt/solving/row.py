"""The values that the levels log in one outer step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import ProblemError

__all__ = ["Row", "is_number"]


class Row:
    """The logged values of one outer step, of which each step of a level replaces its own.

    Attributes:
        values: the values by column.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        #: The columns to which the present step of a level has added.
        self._added: set[str] = set()
        #: For each value of the present step of a level, the number of batches that logged it.
        self._counts: dict[str, int] = {}

    def clear(self) -> None:
        """Begin an outer step."""
        self.values = {}

    def begin(self) -> None:
        """Begin a step of a level."""
        self._added, self._counts = set(), {}

    def add(self, key: str, value: Any, share: float, *, first: bool) -> None:
        """Add `share` times a value to a column; the first batch of a step replaces what the column holds.

        Raises:
            ProblemError: the value is logged for a later batch of a step and not for the first.
        """
        if share != 1.0:
            if first != (key not in self._counts):
                raise ProblemError(f"{key!r} is logged for some of the batches of a step; log it for all or for none")
            value = share * value if first else self.values[key] + share * value
            self._counts[key] = self._counts.get(key, 0) + 1
        self.values[key] = value
        self._added.add(key)

    def require_complete(self, batches: int) -> None:
        """Raise unless every batch of the step has logged the same columns."""
        for key, count in self._counts.items():
            if count != batches:
                raise ProblemError(
                    f"{key!r} is logged for {count} of the {batches} batches of a step; log it for all or for none"
                )

    @property
    def numbers(self) -> Mapping[str, Any]:
        """The numbers that the present step of a level has added."""
        return {key: value for key, value in self.values.items() if key in self._added and is_number(value)}


def is_number(value: Any) -> bool:
    """Return True for a number, and for a tensor that holds one."""
    return isinstance(value, (bool, int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
