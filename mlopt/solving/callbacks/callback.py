"""The interface of callbacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from ..run import Run

__all__ = ["Callback"]


class Callback:
    """Base class of callbacks, whose methods `solve` calls; override those that are needed.

    On several processes, the callbacks run in each of them, except those with `in_every_process = False`, which run in the first
    only: those that write files. All processes see the same history.

    Every method does nothing by default. Several callbacks are called in the order in which they are passed to `solve`.

    Example:
        >>> class Stop(mlopt.Callback):
        ...     def on_step_end(self, run):
        ...         if run.history[-1]["x/loss"] < 0:
        ...             run.stop("the loss is negative")
        >>> from mlopt.testing import quadratic
        >>> problem = quadratic("two", mlopt.Identity()).problem
        >>> mlopt.solve(problem, steps=1_000, callbacks=[Stop()]).status
        'the loss is negative'
    """

    #: Whether the callback runs in every process of a run on several, and not in the first only.
    in_every_process: ClassVar[bool] = True
    #: True if the callback may read `.grad` of the levels inside, which takes memory: without such a callback, a pullback that
    #: assumes the inverse Hessian frees it. `.grad` of the outermost level always stays until its next step.
    reads_gradients: ClassVar[bool] = True

    def on_train_begin(self, run: Run) -> None:
        """Called before the first step. In a resumed run, `run.step` > 0 and `run.history` holds the earlier rows."""

    def on_step_begin(self, run: Run) -> None:
        """Called before each outer step."""

    def on_step_end(self, run: Run) -> None:
        """Called after each outer step. Its row is `run.history[-1]`; to read it, the host waits for the device."""

    def on_evaluate(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Called after an evaluation. The history holds each metric as `evaluation/name`."""

    def on_log(self, run: Run, rows: Sequence[Mapping[str, float]]) -> None:
        """Called every `log_every` steps and at the end, with the new rows of the history."""

    def on_save(self, run: Run, folder: Path) -> None:
        """Called after a checkpoint was written to the folder."""

    def on_train_end(self, run: Run) -> None:
        """Called once at the end, also if an error or a signal ends the run; `run.status` is the reason."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs: tensors, numbers, strings, lists and mappings."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state that `state_dict` returned for the checkpoint; called before `on_train_begin`."""
