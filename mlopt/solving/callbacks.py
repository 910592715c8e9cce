"""What can look on while a problem is solved: callbacks, and the progress display, which is one of them."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .run import Run

__all__ = ["Callback", "ProgressDisplay"]


class Callback:
    """Something that is called while a problem is solved; override what is needed.

    Example:
        >>> class StopEarly(mlopt.Callback):
        ...     def on_step_end(self, run):
        ...         if run.history[-1]["weights/loss"] < 0.1:
        ...             run.stop("the validation loss is below 0.1")
    """

    def on_train_begin(self, run: Run) -> None:
        """Called before the first outer step."""

    def on_step_end(self, run: Run) -> None:
        """Called after each outer step, its row of the history written."""

    def on_train_end(self, run: Run) -> None:
        """Called once at the end, also when an error ends the run."""


class ProgressDisplay(Callback):
    """A progress bar with the losses of the levels; nothing is drawn where there is no terminal.

    Args:
        description: what is shown before the bar.
        console: where to draw; standard error when None.
    """

    def __init__(self, description: str = "solving", console: Console | None = None) -> None:
        self._description = description
        self._console = console or Console(stderr=True)
        self._progress: Progress | None = None

    def on_train_begin(self, run: Run) -> None:
        if not self._console.is_terminal:
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, TextColumn("{task.fields[losses]}"), console=self._console)
        self._task = self._progress.add_task(self._description, total=run.steps, losses="")
        self._progress.start()

    def on_step_end(self, run: Run) -> None:
        if self._progress is not None:
            row = run.history[-1]
            losses = "  ".join(f"{key.removesuffix('/loss')} {row[key]:.4g}" for key in row if key.endswith("/loss"))
            self._progress.update(self._task, completed=run.step, losses=losses)

    def on_train_end(self, run: Run) -> None:
        if self._progress is not None:
            self._progress.stop()
