"""The phases of a run, which are shown one after the other."""

from __future__ import annotations

import attrs

import mlopt

__all__ = ["Phases"]


@attrs.define(eq=False)
class Phases:
    """The display of the phases of a run: each has a title and a number.

    Args:
        total: the number of phases; 0 if it is not known.
        display: shows them.
    """

    total: int = 0
    display: mlopt.ProgressDisplay = attrs.field(factory=mlopt.ProgressDisplay)
    _begun: int = attrs.field(default=0, init=False)

    def next(self, title: str) -> mlopt.ProgressDisplay:
        """Return the display, which shows the next phase under its title and its number."""
        self._begun += 1
        # A method of a user may solve more phases than it states.
        number = f"{self._begun}/{self.total}" if self._begun <= self.total else f"{self._begun}"
        self.display.description = f"[{number}] {title}"
        return self.display
