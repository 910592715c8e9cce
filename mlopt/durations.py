"""Durations in words."""

from __future__ import annotations

__all__ = ["in_words"]


def in_words(seconds: float) -> str:
    """Return a rough duration, such as "7 minutes": whole seconds, minutes or hours, and at least one second.

    Args:
        seconds: the duration.

    Example:
        >>> from mlopt.durations import in_words
        >>> in_words(0.2), in_words(59.4), in_words(59.6), in_words(5_400)
        ('1 second', '59 seconds', '1 minute', '2 hours')
    """
    hour, minute = 3_600, 60
    # Above these, the smaller unit would be rounded up to a whole one of the larger.
    if seconds >= hour - minute / 2:
        size, unit = hour, "hour"
    elif seconds >= minute - 0.5:
        size, unit = minute, "minute"
    else:
        size, unit = 1, "second"
    count = max(1, round(seconds / size))
    return f"{count} {unit}{'s' * (count != 1)}"
