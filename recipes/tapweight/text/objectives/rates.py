"""Checks of the shares that objectives draw."""

from __future__ import annotations


def check_rate(name: str, rate: float) -> float:
    """Return `rate`.

    Raises:
        ValueError: it is not a probability above 0 and below 1.
    """
    if not 0 < rate < 1:
        raise ValueError(f"{name} must be above 0 and below 1; got {rate!r}")
    return rate
