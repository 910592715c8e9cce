"""The logged values of a run: one row for each outer step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ..errors import MloptError, ProblemError

__all__ = ["History", "UnknownColumnError"]


class UnknownColumnError(MloptError, KeyError):
    """The history has no column of this name."""

    __str__ = MloptError.__str__  # a KeyError would show the message in quotes


class History:
    """Rows of named numbers, one for each outer step; NaN and infinity are kept.

    Tensors are stored as they are and read when a row is requested, so logging does not wait for a device.

    Example:
        >>> from mlopt.testing import quadratic
        >>> history = mlopt.solve(quadratic("two", mlopt.Identity()).problem, steps=3).history
        >>> history
        History(3 rows of step, y/loss, x/loss)
        >>> history[-1]["step"], len(history.column("x/loss"))
        (3, 3)
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; its tensors are detached.

        Raises:
            ProblemError: a tensor is not a scalar.
        """
        detached = dict(row)
        for key, value in detached.items():
            if isinstance(value, Tensor):
                if value.numel() != 1:
                    raise ProblemError(
                        f"{key!r} was logged with shape {tuple(value.shape)}; log scalars, such as its norm"
                    )
                if value.requires_grad:
                    detached[key] = value.detach()
        self._rows.append(detached)

    def amend(self, values: Mapping[str, Any]) -> None:
        """Add values to the last row."""
        self._rows[-1] |= values

    def column(self, name: str) -> list[float]:
        """Return the values of a column, from the rows that have it.

        Raises:
            UnknownColumnError: no row has it; the message lists the columns.
        """
        values = [row[name] for row in self if name in row]
        if not values:
            raise UnknownColumnError(f"the history has no {name!r}; it has {', '.join(self.names) or 'no rows'}")
        return values

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the columns, in the order in which they were first logged."""
        return tuple(dict.fromkeys(key for row in self._rows for key in row))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, float]:
        row = self._rows[index]
        for key, value in row.items():
            if isinstance(value, Tensor):
                row[key] = value.item()
        return dict(row)

    def __iter__(self) -> Iterator[dict[str, float]]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"History({len(self)} rows of {', '.join(self.names)})"
