"""A finding: how bad, what, and what to do about it."""

from __future__ import annotations

from typing import Literal

import attrs

__all__ = ["Finding"]


@attrs.frozen
class Finding:
    """One thing that an examination met.

    Attributes:
        severity: "ok", "warning" or "error"; what has an error gives wrong hypergradients, or none.
        sentence: what was met.
        remedy: what to do about it; empty where there is nothing to do.
    """

    severity: Literal["ok", "warning", "error"]
    sentence: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.sentence}; {self.remedy}" if self.remedy else self.sentence
