"""The progress bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .callback import Callback

if TYPE_CHECKING:
    from ..run import Run

__all__ = ["ProgressDisplay"]


class ProgressDisplay(Callback):
    """A progress bar with the losses of the levels and the last metrics; it is drawn only on a terminal.

    The bar moves at every step. The losses are those of the last logged row, so that the host does not wait for a device.

    Args:
        description: the text before the bar.
        console: draw here; None for standard error.

    Example:
        >>> from mlopt.testing import quadratic
        >>> problem = quadratic("two", mlopt.Identity()).problem
        >>> bar = mlopt.ProgressDisplay("reweighting")
        >>> solution = mlopt.solve(problem, steps=10, progress=False, callbacks=[bar])
    """

    def __init__(self, description: str = "solving", console: Console | None = None) -> None:
        self._description = description
        self._console = console or Console(stderr=True)
        self._progress: Progress | None = None

    def on_train_begin(self, run: Run) -> None:
        if not self._console.is_terminal:
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        numbers = (TextColumn("{task.fields[losses]}"), TextColumn("{task.fields[metrics]}"))
        self._progress = Progress(*columns, *numbers, console=self._console)
        self._task = self._progress.add_task(
            self._description, total=run.steps, completed=run.step, losses="", metrics=""
        )
        self._progress.start()

    def on_step_end(self, run: Run) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=run.step)

    def on_evaluate(self, run: Run, metrics: Mapping[str, float]) -> None:
        if self._progress is not None:
            self._progress.update(self._task, metrics=_text(metrics))

    def on_log(self, run: Run, rows: Sequence[Mapping[str, float]]) -> None:
        if self._progress is not None and rows:
            losses = {key.removesuffix("/loss"): rows[-1][key] for key in rows[-1] if key.endswith("/loss")}
            # A metric with the name "loss" is shown with the metrics.
            losses.pop("evaluation", None)
            self._progress.update(self._task, losses=_text(losses))

    def on_train_end(self, run: Run) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _text(numbers: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
