"""What a run logged: a row for each outer step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ..errors import MloptError, ProblemError

__all__ = ["History", "UnknownColumnError"]


class UnknownColumnError(MloptError, KeyError):
    """The history has no such column."""

    __str__ = MloptError.__str__


class History:
    """Rows of named numbers, one for each outer step. NaN and infinity are kept as they are.

    Tensors are kept as they come and read when a row is asked for, so that logging makes no device wait.

    Example:
        >>> solution.history[-1]["classifier/loss"]
        >>> solution.history.column("weights/loss")
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; tensors in it are detached.

        Raises:
            ProblemError: a tensor in it is no scalar.
        """
        kept = dict(row)
        for key, value in kept.items():
            if isinstance(value, Tensor):
                if value.numel() != 1:
                    raise ProblemError(
                        f"{key!r} was logged with shape {tuple(value.shape)}; log scalars, such as its norm"
                    )
                if value.requires_grad:
                    kept[key] = value.detach()
        self._rows.append(kept)

    def amend(self, values: Mapping[str, Any]) -> None:
        """Add quantities to the last row."""
        self._rows[-1] |= values

    def column(self, name: str) -> list[float]:
        """Return one quantity over the rows that have it.

        Raises:
            UnknownColumnError: no row has it; the message lists what there is.
        """
        values = [row[name] for row in self if name in row]
        if not values:
            raise UnknownColumnError(f"the history has no {name!r}; it has {', '.join(self.names) or 'no rows'}")
        return values

    @property
    def names(self) -> tuple[str, ...]:
        """What has been logged, in the order of its first appearance."""
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
