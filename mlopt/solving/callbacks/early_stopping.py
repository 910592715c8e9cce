"""Stop a run whose metric no longer improves."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from ...validation import at_least
from .callback import Callback

if TYPE_CHECKING:
    from ..run import Run

__all__ = ["EarlyStopping"]

_PREFIX = "evaluation/"


@attrs.define(eq=False)
class EarlyStopping(Callback):
    """Stops the run when a metric has not improved for `patience` values in a row.

    A value m improves on the best value b if b - m > min_delta, or, if greater is better, m - b > min_delta. NaN never improves.
    A column of evaluations is checked at each evaluation. Another column is checked row by row when rows are logged, so the run
    ends at a multiple of `log_every`. A resumed run ends at the same step as an uninterrupted one.

    Args:
        metric: a column of the history, such as "evaluation/accuracy" or "weights/loss".
        patience: number of values in a row without improvement, at least 1.
        greater_is_better: whether a greater value is better.
        min_delta: the smallest improvement, in the unit of the metric.

    Warns:
        UserWarning: at the end, if the history has no such column; the message lists its columns.

    Example:
        >>> from mlopt.testing import quadratic
        >>> problem = quadratic("two", mlopt.Identity()).problem
        >>> mlopt.solve(problem, 1_000, callbacks=[mlopt.EarlyStopping("y/loss", patience=10)]).status
        'early stopping: y/loss was no better than 1.96..., of step 2, in 10 rows'
    """

    reads_gradients: ClassVar[bool] = False

    metric: str
    patience: int = attrs.field(validator=at_least(1))
    greater_is_better: bool = attrs.field(default=False, kw_only=True)
    min_delta: float = attrs.field(default=0.0, kw_only=True, validator=at_least(0.0))
    _best: float = attrs.field(init=False)
    _best_step: int = attrs.field(init=False)
    _waited: int = attrs.field(init=False)
    #: Rows of the history that were checked; a run that resumes between two logs continues there.
    _checked: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._best = -math.inf if self.greater_is_better else math.inf
        self._best_step, self._waited, self._checked = -1, 0, 0

    def on_train_begin(self, run: Run) -> None:
        if run.step == 0:
            # The object may come from another run.
            self.__attrs_post_init__()

    def on_evaluate(self, run: Run, metrics: Mapping[str, float]) -> None:
        name = self.metric.removeprefix(_PREFIX)
        if self.metric.startswith(_PREFIX) and name in metrics:
            self._check(run, float(metrics[name]), run.step, "evaluations")

    def on_log(self, run: Run, rows: Sequence[Mapping[str, float]]) -> None:
        if self.metric.startswith(_PREFIX):
            return
        while self._checked < len(run.history) and run.status is None:
            row = run.history[self._checked]
            self._checked += 1
            if self.metric in row:
                self._check(run, float(row[self.metric]), int(row["step"]), "rows")

    def on_train_end(self, run: Run) -> None:
        names = run.history.names
        if names and self.metric not in names:
            warnings.warn(
                f"EarlyStopping: metric={self.metric!r} was never logged, so it had no effect; the history has "
                f"{', '.join(names)}",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "best": self._best,
            "best_step": self._best_step,
            "waited": self._waited,
            "checked": self._checked,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["metric"] != self.metric:
            warnings.warn(
                f"EarlyStopping: metric={self.metric!r} starts without a best value, because the checkpoint has that of "
                f"{state['metric']!r}",
                stacklevel=2,
            )
            return
        self._best, self._best_step = state["best"], state["best_step"]
        self._waited, self._checked = state["waited"], state["checked"]

    def _check(self, run: Run, value: float, step: int, unit: str) -> None:
        # Comparisons with NaN are False, also with the difference of two equal infinities.
        if (value - self._best if self.greater_is_better else self._best - value) > self.min_delta:
            self._best, self._best_step, self._waited = value, step, 0
            return
        self._waited += 1
        if self._waited >= self.patience and run.status is None:
            best = f"no better than {self._best:.6g}, of step {self._best_step},"
            reason = best if self._best_step >= 0 else "not finite"
            run.stop(f"early stopping: {self.metric} was {reason} in {self._waited} {unit}")
