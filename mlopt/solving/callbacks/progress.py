"""The progress of a run: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ...durations import in_words
from .callback import Callback

if TYPE_CHECKING:
    from ..run import Run

__all__ = ["ProgressDisplay"]

#: Seconds from one line to the next.
_INTERVAL = 60.0
#: Seconds before the first line of a run with a description.
_SHORT = 5.0


class ProgressDisplay(Callback):
    """The progress of a run, with the losses of the levels and the last metrics: a bar on a terminal, lines elsewhere.

    The bar moves at every step. A notebook with ipywidgets shows it too. Lines are printed after a step: one a minute, and one
    at the end if there was a line before. A run with a description has its first line after five seconds. A shorter run prints
    nothing. The losses are those of the last logged row, so that the host does not wait for a device.

    One display may be passed to several runs in turn. The minute counts from its last line, so short runs print one a minute.

    Args:
        description: the text before the bar and in each line; "solving" if None. It may be set between runs.
        console: draw here; None for standard error.
        clock: returns a time in seconds.

    Example:
        >>> from mlopt.testing import quadratic
        >>> problem = quadratic("two", mlopt.Identity()).problem
        >>> bar = mlopt.ProgressDisplay("reweighting")
        >>> solution = mlopt.solve(problem, steps=10, progress=False, callbacks=[bar])
    """

    in_every_process: ClassVar[bool] = False
    reads_gradients: ClassVar[bool] = False

    def __init__(
        self,
        description: str | None = None,
        console: Console | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.description = description
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._begin = self._last_line = clock()
        self._first_step, self._has_printed = 0, False
        self._losses = self._metrics = ""
        self._progress: Progress | None = None

    def on_train_begin(self, run: Run) -> None:
        self._begin, self._first_step, self._has_printed = self._clock(), run.step, False
        self._losses = self._metrics = ""
        if not _shows_bars(self._console):
            return
        name, *numbers = (
            TextColumn(f"{{task.{field}}}", markup=False)
            for field in ("description", "fields[losses]", "fields[metrics]")
        )
        columns = (name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), *numbers)
        self._progress = Progress(*columns, console=self._console)
        self._task = self._progress.add_task(self._name, total=run.steps, completed=run.step, losses="", metrics="")
        self._progress.start()

    def on_step_end(self, run: Run) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=run.step)
        elif run.step < run.steps and self._is_due():
            seconds = self._elapsed() / (run.step - self._first_step) * (run.steps - run.step)
            self._print(f"step {run.step:,} of {run.steps:,}, {in_words(seconds)} left")

    def on_evaluate(self, run: Run, metrics: Mapping[str, float]) -> None:
        self._metrics = _text(metrics)
        self._show_numbers()

    def on_log(self, run: Run, rows: Sequence[Mapping[str, float]]) -> None:
        if rows:
            losses = {key.removesuffix("/loss"): rows[-1][key] for key in rows[-1] if key.endswith("/loss")}
            # A metric with the name "loss" is shown with the metrics.
            losses.pop("evaluation", None)
            self._losses = _text(losses)
            self._show_numbers()

    def on_train_end(self, run: Run) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        elif self._is_due() or (self._has_printed and self._elapsed() >= _SHORT):
            status, duration = run.status or "failed", in_words(self._elapsed())
            self._print(f"{status} at step {run.step:,} of {run.steps:,} after {duration}")

    @property
    def _name(self) -> str:
        return self.description or "solving"

    def _show_numbers(self) -> None:
        if self._progress is not None:
            self._progress.update(self._task, losses=self._losses, metrics=self._metrics)

    def _elapsed(self) -> float:
        return self._clock() - self._begin

    def _is_due(self) -> bool:
        """Return True if a line is due."""
        is_first = self.description is not None and not self._has_printed and self._elapsed() >= _SHORT
        return is_first or self._clock() - self._last_line >= _INTERVAL

    def _print(self, text: str) -> None:
        numbers = "; ".join(filter(None, (self._losses, self._metrics)))
        line = f"{self._name}: {text}{numbers and f'; {numbers}'}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._last_line, self._has_printed = self._clock(), True


def _shows_bars(console: Console) -> bool:
    return console.is_interactive or (console.is_jupyter and find_spec("ipywidgets") is not None)


def _text(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
