"""Send the history to an experiment tracker: TensorBoard, Weights & Biases, Trackio or MLflow."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ...imports import import_optional
from .callback import Callback

if TYPE_CHECKING:
    from ..run import Run

__all__ = ["MLflowLogger", "TensorBoardLogger", "TrackioLogger", "WandbLogger"]


class _Tracker(Callback):
    """Sends each row with its outer step; a resumed run starts with the first row that was not sent before its checkpoint."""

    in_every_process: ClassVar[bool] = False
    reads_gradients: ClassVar[bool] = False

    def __init__(self, module: str, requirement: str) -> None:
        self._package = import_optional(module, type(self).__name__, requirement)
        self._tracked: Any = None
        #: The name of the run in the tracker; empty before the run starts.
        self._id = ""
        self._sent = 0

    def on_train_begin(self, run: Run) -> None:
        self._tracked = self._begin()

    def on_log(self, run: Run, rows: Sequence[Mapping[str, float]]) -> None:
        self._send(run)

    def on_train_end(self, run: Run) -> None:
        if self._tracked is not None:
            # An error may end the run between two logs.
            self._send(run)
            self._end(run)
            # The object may be used for another run.
            self._tracked, self._id, self._sent = None, "", 0

    def state_dict(self) -> dict[str, Any]:
        return {"id": self._id, "sent": self._sent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._id, self._sent = state["id"], state["sent"]

    def _send(self, run: Run) -> None:
        while self._sent < len(run.history):
            row = run.history[self._sent]
            step = int(row.pop("step"))
            self._write(row, step)
            self._sent += 1

    @abstractmethod
    def _begin(self) -> Any: ...

    @abstractmethod
    def _write(self, row: dict[str, float], step: int) -> None: ...

    @abstractmethod
    def _end(self, run: Run) -> None: ...


class TensorBoardLogger(_Tracker):
    """Writes the history as scalars for TensorBoard, which stores them in float32.

    TensorBoard hides values of an earlier run in the folder, and of steps after the checkpoint from which a run resumes.

    Args:
        folder: the folder of the event files; created if it does not exist.

    Raises:
        MissingDependencyError: tensorboard is not installed.

    Example:
        >>> mlopt.solve(problem, steps=1_000, callbacks=[mlopt.TensorBoardLogger("runs/first")])  # doctest: +SKIP
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__("torch.utils.tensorboard", "'mlopt-torch[tracking]'")
        self._folder = str(folder)

    def _begin(self) -> Any:
        return self._package.SummaryWriter(self._folder, purge_step=self._sent + 1)

    def _write(self, row: dict[str, float], step: int) -> None:
        for name, value in row.items():
            self._tracked.add_scalar(name, value, step)

    def _send(self, run: Run) -> None:
        super()._send(run)
        self._tracked.flush()

    def _end(self, run: Run) -> None:
        self._tracked.close()


class WandbLogger(_Tracker):
    """Logs the history to Weights & Biases; its step is the outer step, and a resumed run continues the run there.

    A resumed run starts with the first step that Weights & Biases lacks, or, offline, with the first step. The status is in the
    summary.

    Args:
        arguments: arguments of `wandb.init`, such as project and config.

    Raises:
        MissingDependencyError: wandb is not installed.

    Example:
        >>> mlopt.solve(problem, steps=1_000, callbacks=[mlopt.WandbLogger(project="hyper-cleaning")])  # doctest: +SKIP
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__("wandb", "wandb")
        self._arguments = arguments

    def _begin(self) -> Any:
        resumed = {"id": self._id, "resume": "allow"} if self._id else {}
        tracked = self._package.init(**self._arguments | resumed)
        # Sent rows may not have arrived, and rows that have arrived are refused.
        self._id, self._sent = tracked.id, max(0, tracked.starting_step - 1)
        return tracked

    def _write(self, row: dict[str, float], step: int) -> None:
        self._tracked.log(row, step=step)

    def _end(self, run: Run) -> None:
        self._tracked.summary["status"] = run.status
        self._tracked.finish()


class TrackioLogger(_Tracker):
    """Logs the history to Trackio; its step is the outer step, and a resumed run continues the run there.

    Steps after the checkpoint from which a run resumes are in Trackio twice. Trackio stores rows within half a second; a run
    that is killed before that leaves a gap.

    Args:
        arguments: arguments of `trackio.init`, such as project and config.

    Raises:
        MissingDependencyError: trackio is not installed.

    Example:
        >>> mlopt.solve(problem, steps=1_000, callbacks=[mlopt.TrackioLogger(project="hyper-cleaning")])  # doctest: +SKIP
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__("trackio", "trackio")
        self._arguments = arguments

    def _begin(self) -> Any:
        resumed = {"name": self._id, "resume": "allow"} if self._id else {}
        tracked = self._package.init(**self._arguments | resumed)
        self._id = tracked.name
        return tracked

    def _write(self, row: dict[str, float], step: int) -> None:
        self._tracked.log(row, step=step)

    def _end(self, run: Run) -> None:
        self._tracked.finish()


class MLflowLogger(_Tracker):
    """Logs the history to MLflow; its step is the outer step, and a resumed run continues the run there.

    Steps after the checkpoint from which a run resumes are in MLflow twice. The status is a tag. The databases of MLflow store
    infinity as the largest float. Choose the database with `mlflow.set_tracking_uri`.

    Args:
        arguments: arguments of `mlflow.start_run`, such as run_name and tags.

    Raises:
        MissingDependencyError: mlflow is not installed.

    Example:
        >>> mlopt.solve(problem, steps=1_000, callbacks=[mlopt.MLflowLogger(run_name="hyper-cleaning")])  # doctest: +SKIP
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__("mlflow", "mlflow")
        self._arguments = arguments

    def _begin(self) -> Any:
        resumed = {"run_id": self._id} if self._id else {}
        tracked = self._package.start_run(**self._arguments | resumed)
        self._id = tracked.info.run_id
        return tracked

    def _write(self, row: dict[str, float], step: int) -> None:
        self._package.log_metrics(row, step=step, run_id=self._id)

    def _end(self, run: Run) -> None:
        self._package.set_tag("status", run.status)
        self._package.end_run()
