"""The interface of what looks on while a problem is solved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..run import Run

__all__ = ["Callback"]


class Callback:
    """Something that is called while a problem is solved; override what is needed.

    Every method does nothing by default, and several callbacks are called in the order in which `solve` was given them.

    Example:
        >>> class StopEarly(mlopt.Callback):
        ...     def on_log(self, run, rows):
        ...         if rows[-1]["weights/loss"] < 0.1:
        ...             run.stop("the validation loss is below 0.1")
        >>> mlopt.solve(problem, steps=1_000, callbacks=[StopEarly()])
    """

    def on_train_begin(self, run: Run) -> None:
        """Called before the first step; of a resumed run `run.step` > 0, and `run.history` holds all earlier rows."""

    def on_step_begin(self, run: Run) -> None:
        """Called before each outer step."""

    def on_step_end(self, run: Run) -> None:
        """Called after each outer step; its row is `run.history[-1]`, and reading that waits for the device."""

    def on_evaluate(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Called after an evaluation; the history has the metrics under "evaluation/" and their name."""

    def on_log(self, run: Run, rows: Sequence[Mapping[str, float]]) -> None:
        """Called every `log_every` steps and at the end, with the rows of the history since the last call."""

    def on_save(self, run: Run, folder: Path) -> None:
        """Called after a checkpoint has been written to the folder."""

    def on_train_end(self, run: Run) -> None:
        """Called once at the end, also when an error or a signal ends the run; `run.status` says why it ended."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs of this one: tensors, numbers, text, lists and mappings."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned when the checkpoint was written; called before `on_train_begin`."""
