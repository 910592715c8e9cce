"""Stopping a run whose metric no longer gets better."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from ...validation import at_least
from .callback import Callback

if TYPE_CHECKING:
    from ..run import Run

__all__ = ["EarlyStopping"]

_PREFIX = "evaluation/"


@attrs.define(eq=False)
class EarlyStopping(Callback):
    """Stops the run once a metric has not been better than its best value for `patience` judgements in a row.

    A value m is better than the best one, b, where b - m > min_delta, or m - b > min_delta where greater is better. NaN is
    never better. A column of evaluations is judged at each evaluation, any other one row by row whenever rows are logged, so
    the run ends at a step that `log_every` divides. A resumed run ends at the step where it would have ended otherwise.

    Args:
        metric: the column of the history, such as "evaluation/accuracy" or "weights/loss".
        patience: evaluations, or rows, in a row without a better value; 1 or more.
        greater_is_better: whether a larger value is a better one.
        min_delta: how much better a value must be, in the metric's unit.

    Warns:
        UserWarning: at the end, if the history has no such column; the message lists those that it has.

    Example:
        >>> mlopt.solve(problem, steps=1_000, callbacks=[mlopt.EarlyStopping("weights/loss", patience=20)])
    """

    metric: str
    patience: int = attrs.field(validator=at_least(1))
    greater_is_better: bool = attrs.field(default=False, kw_only=True)
    min_delta: float = attrs.field(default=0.0, kw_only=True, validator=at_least(0.0))
    _best: float = attrs.field(init=False)
    _best_step: int = attrs.field(init=False)
    _waited: int = attrs.field(init=False)
    #: Rows of the history that have been judged: where a run is resumed between two logs, the next one begins there.
    _judged: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._best = -math.inf if self.greater_is_better else math.inf
        self._best_step, self._waited, self._judged = -1, 0, 0

    def on_train_begin(self, run: Run) -> None:
        if run.step == 0:
            # The same object may have watched another run.
            self.__attrs_post_init__()

    def on_evaluate(self, run: Run, metrics: Mapping[str, float]) -> None:
        name = self.metric.removeprefix(_PREFIX)
        if self.metric.startswith(_PREFIX) and name in metrics:
            self._judge(run, float(metrics[name]), run.step, "evaluations")

    def on_log(self, run: Run, rows: Sequence[Mapping[str, float]]) -> None:
        if self.metric.startswith(_PREFIX):
            return
        while self._judged < len(run.history) and run.status is None:
            row = run.history[self._judged]
            self._judged += 1
            if self.metric in row:
                self._judge(run, float(row[self.metric]), int(row["step"]), "rows")

    def on_train_end(self, run: Run) -> None:
        names = run.history.names
        if names and self.metric not in names:
            warnings.warn(
                f"EarlyStopping: metric={self.metric!r} was never logged, so it stopped nothing; the history has "
                f"{', '.join(names)}",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "best": self._best,
            "best_step": self._best_step,
            "waited": self._waited,
            "judged": self._judged,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["metric"] != self.metric:
            warnings.warn(
                f"EarlyStopping: metric={self.metric!r} begins to be watched: the checkpoint's watched {state['metric']!r}",
                stacklevel=2,
            )
            return
        self._best, self._best_step = state["best"], state["best_step"]
        self._waited, self._judged = state["waited"], state["judged"]

    def _judge(self, run: Run, value: float, step: int, unit: str) -> None:
        # Comparisons with NaN, and with the difference of two equal infinities, are false.
        if (value - self._best if self.greater_is_better else self._best - value) > self.min_delta:
            self._best, self._best_step, self._waited = value, step, 0
            return
        self._waited += 1
        if self._waited >= self.patience and run.status is None:
            best = f"no better than {self._best:.6g}, of step {self._best_step},"
            found = best if self._best_step >= 0 else "not finite"
            run.stop(f"early stopping: {self.metric} was {found} in {self._waited} {unit}")
