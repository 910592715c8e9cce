"""The mean and the standard deviation over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import attrs

__all__ = ["Spread"]


@attrs.frozen
class Spread:
    """The mean and the sample standard deviation of some numbers; the latter is None for a single one.

    Example:
        >>> from mlopt.recipes.tapweight.spread import Spread
        >>> print(Spread.of([1.0, 2.0, 3.0]))
        2.000 (1.000)
    """

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of one or more numbers."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.std is None else f"{self.mean:.3f} ({self.std:.3f})"
