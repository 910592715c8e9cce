"""The loop of a run: steps, evaluations, logs and checkpoints, and the handling of failures and signals."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import attrs
from torch import Tensor

from ..errors import CheckpointError, CheckpointWarning, Interrupted, NonFiniteError, ProblemError
from ..finiteness import DeferredChecks, deferred, immediate
from ..problem import Problem, require_alike
from ..ranks import ALONE, Ranks
from ..rng import GeneratorState, preserved
from ..shards import whole_values
from .callbacks import Callback
from .checkpoints import Checkpoints
from .interruption import Interruption, ended_elsewhere
from .run import Run

__all__ = ["Evaluate", "Loop"]

Evaluate: TypeAlias = Callable[[Problem], Mapping[str, Any]]

_ELSEWHERE = "another process ended"


@attrs.define(kw_only=True, eq=False)
class Loop:
    """Executes a run; see `mlopt.solve` for the arguments.

    Args:
        run: the run.
        callbacks: called in this order.
        checkpoints: saves the run; None to save nothing.
        evaluate: returns metrics; None to evaluate nothing.
        evaluate_every: outer steps between evaluations.
        log_every: outer steps between calls of `on_log`.
        max_seconds: time after which no step is started.
        on_nonfinite: "raise", "skip" or "rollback".
        nonfinite_limit: number of skips or rollbacks before an error.
    """

    run: Run
    callbacks: Sequence[Callback]
    checkpoints: Checkpoints | None
    evaluate: Evaluate | None
    evaluate_every: int
    log_every: int
    max_seconds: float | None
    on_nonfinite: str
    nonfinite_limit: int
    _checks: DeferredChecks = attrs.field(factory=DeferredChecks, init=False)
    _saved: tuple[int, int, str | None] | None = attrs.field(default=None, init=False)
    #: The reason to stop that a resumed run forgets: a signal, or the time limit.
    _interrupted_by: str | None = attrs.field(default=None, init=False)
    _start_time: float = attrs.field(default=0.0, init=False)
    _ranks: Ranks = attrs.field(default=ALONE, init=False)

    def execute(self, resume: bool, seed: int | None) -> str:
        """Run until the end; return the status.

        Args:
            resume: whether to resume from the newest checkpoint.
            seed: the seed that a resumed run must have; any seed if None.
        """
        self._start_time = time.monotonic()
        self._ranks = self.run.problem.ranks
        if (checkpoints := self.checkpoints) is not None:
            self._ranks.by_first(lambda: checkpoints.prepare(resume))
        generators = self._resume(seed) if resume else None
        try:
            self._call("on_train_begin")
            if generators is not None:
                generators.restore()
            with Interruption() if self.checkpoints is not None else contextlib.nullcontext() as interruption:
                with self._deferring_checks():
                    self._take_steps(interruption)
                self._save(last=True)
            # Set after the last save, so that a resumed run continues after a signal or a time limit.
            self.run.status = self.run.status or self._interrupted_by or "completed"
        except NonFiniteError as error:
            explained = self._explain(error)
            self._end(explained)
            raise explained from error
        except BaseException as error:
            self._end(error)
            raise
        self._end(None)
        if interruption is not None and interruption.received is not None:
            self._exit(interruption.received.name, interruption.status)
        if self._interrupted_by is _ELSEWHERE:
            self._exit(_ELSEWHERE, 0)
        assert self.run.status is not None
        return self.run.status

    def _resume(self, seed: int | None) -> GeneratorState | None:
        """Load the newest checkpoint, if there is one."""
        assert self.checkpoints is not None
        newest = self._ranks.by_first(self.checkpoints.newest)
        if newest is None:
            return None
        _, folder, state = newest
        try:
            generators = self.run.load_state_dict(state, seed=seed)
            self._saved = self._position
            return generators
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from error

    def _deferring_checks(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that defers checks if they would make the host wait for a device, and may be late."""
        waits = any(device.type != "cpu" for device in self.run.problem.devices)
        return deferred(self._checks) if waits and self.on_nonfinite == "raise" else contextlib.nullcontext()

    def _take_steps(self, interruption: Interruption | None) -> None:
        run = self.run

        def in_progress() -> bool:
            timeout = self.max_seconds is not None and time.monotonic() - self._start_time >= self.max_seconds
            if self._ranks.several:
                timeout = self._agree(interruption, timeout)
            if interruption is not None and interruption.received is not None:
                self._interrupted_by = f"{interruption.received.name} received"
            elif timeout and run.step < run.steps:
                self._interrupted_by = f"max_time of {self.max_seconds:g} s reached"
            elif ended_elsewhere():
                self._interrupted_by = _ELSEWHERE
            return run.status is None and self._interrupted_by is None

        while run.step == 0 and run.steps > 0 and in_progress() and self._with_rollback(run.engine.warm_up):
            if self.checkpoints is not None and self.checkpoints.due(self._position[1]):
                self._save()
        while run.step < run.steps and in_progress():
            self._step()

    def _agree(self, interruption: Interruption | None, timeout: bool) -> bool:
        """Let all processes stop after the same step: at a signal, a time limit or a `stop` in any of them; return the second."""
        received = interruption.received if interruption is not None else None
        number, late, stopped = self._ranks.most([float(received or 0), timeout, self.run.status is not None])
        if interruption is not None and number and received is None:
            interruption.received = signal.Signals(int(number))
        if stopped and self.run.status is None:
            self.run.stop("stopped in another process")
        return bool(late)

    def _step(self) -> None:
        run = self.run
        self._call("on_step_begin")
        self._checks.step = run.step + 1
        self._with_rollback(run.engine.step)
        run.step += 1
        self._append_row(run.step)
        self._call("on_step_end")
        if self.evaluate is not None and run.step % self.evaluate_every == 0:
            self._evaluate(self.evaluate)
        if run.step % self.log_every == 0:
            self._log()
        if self.checkpoints is not None and self.checkpoints.due(run.step):
            self._save()

    @property
    def _position(self) -> tuple[int, int, str | None]:
        """Outer steps taken, warm-up steps taken, and the status."""
        return self.run.step, sum(self.run.engine.warmed.values()), self.run.status

    def _with_rollback(self, steps: Callable[[], bool | None]) -> bool:
        """Take steps, and roll them back if a value is not finite and the run allows it; return whether steps were taken."""
        run = self.run
        before = run.engine.snapshot() if self.on_nonfinite == "rollback" else None
        try:
            return steps() is not False
        except NonFiniteError as error:
            if before is None:
                raise
            before.restore()
            run.rollbacks += 1
            if run.rollbacks > self.nonfinite_limit:
                raise NonFiniteError(f"{error}; {self.nonfinite_limit} outer steps were already rolled back") from error
            return True

    def _append_row(self, step: int) -> None:
        """Add the row of an outer step to the history."""
        counts: dict[str, int] = {}
        if self.on_nonfinite == "skip":
            counts["skipped"] = sum(self.run.engine.skipped.values())
        if self.on_nonfinite == "rollback":
            counts["rollbacks"] = self.run.rollbacks
        self.run.history.append({"step": step, **self.run.engine.logs, **counts})

    def _evaluate(self, evaluate: Evaluate) -> None:
        with preserved(self.run.problem.devices), immediate():
            metrics = evaluate(self.run.problem)
        remedy = "it must return a mapping of named numbers, such as {'accuracy': 0.9}"
        if not isinstance(metrics, Mapping):
            raise ProblemError(f"evaluate returned {metrics!r}; {remedy}")
        try:
            metrics = {name: float(v.detach() if isinstance(v, Tensor) else v) for name, v in metrics.items()}
        except (TypeError, ValueError, RuntimeError) as error:
            raise ProblemError(f"evaluate returned {dict(metrics)!r} ({error}); {remedy}") from error
        # The processes decide alike on what follows from the metrics.
        metrics = self._ranks.of_first(metrics)
        self.run.history.amend({f"evaluation/{name}": value for name, value in metrics.items()})
        self._call("on_evaluate", metrics)

    def _log(self) -> None:
        """Pass new rows to the callbacks, then run the deferred checks."""
        self._log_rows()
        self._checks.run()
        self.run.engine.stillness.warn()

    def _log_rows(self) -> None:
        run = self.run
        rows = [run.history[k] for k in range(run.logged, len(run.history))]
        run.logged += len(rows)
        if rows:
            self._call("on_log", rows)

    def _save(self, *, last: bool = False) -> None:
        """Write a checkpoint, unless nothing has changed since the last one.

        New rows are passed to the callbacks only if the run is done: `on_log` must not depend on when a run is saved.

        Raises:
            CheckpointError: the last checkpoint cannot be written, or the state contains a value that no checkpoint can hold.
                Otherwise a failed save is a warning, and the run continues.
        """
        run = self.run
        if last and self._interrupted_by is None:
            self._log()
        else:
            self._checks.run()
        unsaved = self.checkpoints is not None and self._saved != self._position
        if self._ranks.several and (last or unsaved):
            require_alike(run.problem, self._ranks, f"after step {run.step}")
        if (checkpoints := self.checkpoints) is None or not unsaved:
            return
        state = self._state()
        try:
            folder = self._ranks.by_first(lambda: checkpoints.save(run.step, state(), self._score(checkpoints.best)))
        except CheckpointError as error:
            if last or not isinstance(error.__cause__, OSError):
                raise
            warnings.warn(
                f"{error}; the run continues, and tries again at its next save", CheckpointWarning, stacklevel=2
            )
            return
        self._saved = self._position
        self._call("on_save", folder)

    def _state(self) -> Callable[[], dict[str, Any]]:
        """Return a function that returns the state of the run to the first process; all make sharded tensors whole now."""
        if not self.run.problem.sharded:
            return self.run.state_dict
        state: dict[str, Any] = whole_values(self.run.state_dict(), kept=self._ranks.first)
        return lambda: state

    def _score(self, best: str | None) -> float | None:
        """Return the value of the column `Checkpoints.best` at the latest step, if it was logged."""
        run = self.run
        if best is None or not run.step:
            return None
        row = run.history[-1]
        if best not in row and best not in run.history.names:
            pending = best.startswith("evaluation/") and self.evaluate is not None and run.step < self.evaluate_every
            if not pending:
                warnings.warn(
                    f"Checkpoints: best={best!r} has not been logged, so no checkpoint is kept as the best; the history has "
                    f"{', '.join(run.history.names)}",
                    CheckpointWarning,
                    stacklevel=2,
                )
        return row.get(best)

    def _explain(self, error: NonFiniteError) -> NonFiniteError:
        """Log the failed step and save the current state; return an error that names the step, the estimators and the folder."""
        run = self.run
        step = error.step
        if step is None:
            # An immediate check failed. The step has no row yet, unless a callback raised the error.
            step = self._checks.step
            if not len(run.history) or run.history[-1]["step"] != step:
                self._append_row(step)
        self._log_rows()
        estimators = ", ".join(
            f"{level.name}: {rule}" for level in run.problem if (rule := level.response or level.estimator) is not None
        )
        message = f"{f'outer step {step}' if step else 'warm-up'}: {error}" + (
            f" (estimators: {estimators})" if estimators else ""
        )
        if (checkpoints := self.checkpoints) is not None:
            try:
                state = self._state()
                folder = self._ranks.by_first(lambda: checkpoints.save_fault(step, state()))
                message += f"; the current state is saved in {folder}"
            except CheckpointError as unsaved:
                message += f"; the current state could not be saved: {unsaved}"
        return NonFiniteError(message, step=step)

    def _exit(self, reason: str, status: int) -> None:
        if self.checkpoints is not None and self._ranks.first:
            print(
                f"mlopt: {reason}: step {self.run.step} of {self.run.steps} is finished and saved in {self.checkpoints.folder}; "
                "pass resume=True (--resume on the command line) to continue",
                file=sys.stderr,
            )
        raise Interrupted(status)

    def _end(self, error: BaseException | None) -> None:
        """Call `on_train_end` of every callback, even if one fails; an error that ends the run takes precedence."""
        failures = []
        for callback in self.callbacks:
            try:
                callback.on_train_end(self.run)
            except Exception as raised:
                failures.append(raised)
        if failures and error is None:
            raise failures[0]
        if error is not None:
            for failure in failures:
                error.add_note(f"and in on_train_end: {failure!r}")

    def _call(self, hook: str, *arguments: Any) -> None:
        if not self.callbacks:
            return
        # The number of these calls depends on how often the run is logged and saved; their draws must not change training.
        isolated = hook in ("on_evaluate", "on_log", "on_save")
        with preserved(self.run.problem.devices) if isolated else contextlib.nullcontext(), immediate():
            for callback in self.callbacks:
                getattr(callback, hook)(self.run, *arguments)
