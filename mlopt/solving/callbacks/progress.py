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
    """A progress bar with the losses of the levels and the last evaluation; nothing is drawn where there is no terminal.

    The bar moves with every step; losses are those of the latest logged row, so that drawing them makes no device wait.

    Args:
        description: what is shown before the bar.
        console: where to draw; standard error when None.

    Example:
        >>> mlopt.solve(problem, steps=1_000, progress=False, callbacks=[ProgressDisplay("reweighting")])
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
            # A metric called "loss" is shown with the other metrics.
            losses.pop("evaluation", None)
            self._progress.update(self._task, losses=_text(losses))

    def on_train_end(self, run: Run) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _text(numbers: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
