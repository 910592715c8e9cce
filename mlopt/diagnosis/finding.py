"""A finding: its severity, a sentence, and a remedy."""

from __future__ import annotations

from typing import Literal

import attrs

__all__ = ["Finding"]


@attrs.frozen
class Finding:
    """One finding of a diagnosis.

    Attributes:
        severity: "ok", "warning" or "error"; an error means wrong hypergradients, or none.
        sentence: the finding in words.
        remedy: the action to take; empty if there is none.
    """

    severity: Literal["ok", "warning", "error"]
    sentence: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.sentence}; {self.remedy}" if self.remedy else self.sentence
