"""The loop of a run: steps, evaluations, logs, checkpoints, and what happens where something fails or a signal comes."""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import attrs
from torch import Tensor

from ..errors import CheckpointError, CheckpointWarning, Interrupted, NonFiniteError, ProblemError
from ..finiteness import Watch, at_once, deferred
from ..problem import Problem
from ..rng import GeneratorState, preserved
from .callbacks import Callback
from .checkpoints import Checkpoints
from .interruption import Interruption
from .run import Run

__all__ = ["Evaluate", "Loop"]

Evaluate: TypeAlias = Callable[[Problem], Mapping[str, Any]]


@attrs.define(kw_only=True, eq=False)
class Loop:
    """What goes on around the steps of a run; see `mlopt.solve` for the arguments.

    Args:
        run: the run.
        watchers: callbacks, in the order in which they are called.
        checkpoints: where the run is saved; nowhere when None.
        evaluate: what is evaluated, if anything, and after how many steps each time.
        log_every: after how many steps rows are handed to the callbacks.
        seconds: how long steps may be begun.
        on_nonfinite: "raise", "skip" or "rollback".
        limit: how often something may be not finite, where it is not raised.
    """

    run: Run
    watchers: Sequence[Callback]
    checkpoints: Checkpoints | None
    evaluate: Evaluate | None
    evaluate_every: int
    log_every: int
    seconds: float | None
    on_nonfinite: str
    limit: int
    _watch: Watch = attrs.field(factory=Watch, init=False)
    _saved: tuple[int, int, str | None] | None = attrs.field(default=None, init=False)
    _ended: str | None = attrs.field(default=None, init=False)
    _began: float = attrs.field(default=0.0, init=False)

    def go(self, resume: bool, seed: int | None) -> str:
        """Run until done; return why it ended.

        Args:
            resume: whether to go on from the newest checkpoint.
            seed: what the run to go on with must have had.
        """
        self._began = time.monotonic()
        if self.checkpoints is not None:
            self.checkpoints.claim(resume)
        generators = self._resume(seed) if resume else None
        try:
            self._call("on_train_begin")
            if generators is not None:
                generators.restore()
            with Interruption() if self.checkpoints is not None else contextlib.nullcontext() as interruption:
                with self._watching():
                    self._steps(interruption)
                self._save(last=True)
            # Only now: a run that is gone on with goes on where time was up or a signal came, not where a callback stopped it.
            self.run.status = self.run.status or self._ended or "completed"
        except NonFiniteError as error:
            told = self._told(error)
            self._end(told)
            raise told from error
        except BaseException as error:
            self._end(error)
            raise
        self._end(None)
        if interruption is not None and interruption.received is not None:
            self._leave(interruption)
        assert self.run.status is not None
        return self.run.status

    def _resume(self, seed: int | None) -> GeneratorState | None:
        """Load the newest checkpoint, where there is one."""
        assert self.checkpoints is not None
        found = self.checkpoints.newest()
        if found is None:
            return None
        _, folder, state = found
        try:
            generators = self.run.load_state_dict(state, seed=seed)
            self._saved = self._place
            return generators
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from error

    def _watching(self) -> contextlib.AbstractContextManager[None]:
        """Let what is not finite be noted on the devices, where looking would make the host wait and nothing asks for it."""
        away = any(device.type != "cpu" for device in self.run.problem.devices)
        return deferred(self._watch) if away and self.on_nonfinite == "raise" else contextlib.nullcontext()

    def _steps(self, interruption: Interruption | None) -> None:
        run = self.run

        def goes_on() -> bool:
            if interruption is not None and interruption.received is not None:
                self._ended = f"{interruption.received.name} received"
            elif self.seconds is not None and time.monotonic() - self._began >= self.seconds and run.step < run.steps:
                self._ended = f"max_time of {self.seconds:g} s reached"
            return run.status is None and self._ended is None

        while run.step == 0 and run.steps > 0 and goes_on() and self._guarded(run.engine.warm_up):
            if self.checkpoints is not None and self.checkpoints.due(self._place[1]):
                self._save()
        while run.step < run.steps and goes_on():
            self._step()

    def _step(self) -> None:
        run = self.run
        self._call("on_step_begin")
        self._watch.step = run.step + 1
        self._guarded(run.engine.step)
        run.step += 1
        self._record(run.step)
        self._call("on_step_end")
        if self.evaluate is not None and run.step % self.evaluate_every == 0:
            self._evaluate(self.evaluate)
        if run.step % self.log_every == 0:
            self._log()
        if self.checkpoints is not None and self.checkpoints.due(run.step):
            self._save()

    @property
    def _place(self) -> tuple[int, int, str | None]:
        """How far the run is: outer steps, warm-up steps, and why it ended, if it did."""
        return self.run.step, sum(self.run.engine.warmed.values()), self.run.status

    def _guarded(self, steps: Callable[[], bool | None]) -> bool:
        """Take steps, or take them back where something is not finite and that is asked for; say whether any were taken."""
        run = self.run
        before = run.engine.snapshot() if self.on_nonfinite == "rollback" else None
        try:
            return steps() is not False
        except NonFiniteError as error:
            if before is None:
                raise
            before.restore()
            run.rollbacks += 1
            if run.rollbacks > self.limit:
                raise NonFiniteError(f"{error}; {self.limit} outer steps were taken back already") from error
            return True

    def _record(self, step: int) -> None:
        """Add the row of an outer step to the history."""
        counts: dict[str, int] = {}
        if self.on_nonfinite == "skip":
            counts["skipped"] = sum(self.run.engine.skipped.values())
        if self.on_nonfinite == "rollback":
            counts["rollbacks"] = self.run.rollbacks
        self.run.history.append({"step": step, **self.run.engine.logs, **counts})

    def _evaluate(self, evaluate: Evaluate) -> None:
        with preserved(self.run.problem.devices), at_once():
            metrics = evaluate(self.run.problem)
        remedy = "it must return a mapping of named numbers, such as {'accuracy': 0.9}"
        if not isinstance(metrics, Mapping):
            raise ProblemError(f"evaluate returned {metrics!r}; {remedy}")
        try:
            metrics = {name: float(v.detach() if isinstance(v, Tensor) else v) for name, v in metrics.items()}
        except (TypeError, ValueError, RuntimeError) as error:
            raise ProblemError(f"evaluate returned {dict(metrics)!r} ({error}); {remedy}") from error
        self.run.history.amend({f"evaluation/{name}": value for name, value in metrics.items()})
        self._call("on_evaluate", metrics)

    def _log(self) -> None:
        """Hand the rows since the last time to the callbacks, then look at what was noted as perhaps not finite."""
        self._hand_over()
        self._watch.read()

    def _hand_over(self) -> None:
        run = self.run
        rows = [run.history[k] for k in range(run.logged, len(run.history))]
        run.logged += len(rows)
        if rows:
            self._call("on_log", rows)

    def _save(self, *, last: bool = False) -> None:
        """Write a checkpoint, where the run keeps any and this one is not written yet.

        Rows wait for their turn, unless the run is done: what callbacks make of them must not depend on when a run is saved.

        Raises:
            CheckpointError: it is the last one, or what it should hold cannot be written at all. Else that is a warning, and the
                run goes on.
        """
        run = self.run
        if last and self._ended is None:
            self._log()
        else:
            self._watch.read()
        if self.checkpoints is None or self._saved == self._place:
            return
        try:
            folder = self.checkpoints.save(run.step, run.state_dict(), self._score(self.checkpoints.best))
        except CheckpointError as error:
            if last or not isinstance(error.__cause__, OSError):
                raise
            warnings.warn(
                f"{error}; the run goes on, and tries again at its next save", CheckpointWarning, stacklevel=2
            )
            return
        self._saved = self._place
        self._call("on_save", folder)

    def _score(self, best: str | None) -> float | None:
        """Return the value at the latest step of the column that says which checkpoint is best, if it has one there."""
        run = self.run
        if best is None or not run.step:
            return None
        row = run.history[-1]
        if best not in row and best not in run.history.names:
            to_come = best.startswith("evaluation/") and self.evaluate is not None and run.step < self.evaluate_every
            if not to_come:
                warnings.warn(
                    f"Checkpoints: best={best!r} has not been logged, so no checkpoint is kept as the best; there are "
                    f"{', '.join(run.history.names)}",
                    CheckpointWarning,
                    stacklevel=2,
                )
        return row.get(best)

    def _told(self, error: NonFiniteError) -> NonFiniteError:
        """Log the step that failed, save what there is beside the checkpoints, and say where and under what it failed."""
        run = self.run
        step = error.step
        if step is None:
            # It was noticed at once: within a step that has no row yet, unless a callback met it.
            step = self._watch.step
            if not len(run.history) or run.history[-1]["step"] != step:
                self._record(step)
        self._hand_over()
        estimators = ", ".join(
            f"{level.name}: {level.estimator}" for level in run.problem if level.estimator is not None
        )
        sentence = f"{f'outer step {step}' if step else 'warm-up'}: {error}" + (
            f" (estimators: {estimators})" if estimators else ""
        )
        if self.checkpoints is not None:
            try:
                sentence += f"; the state as it is now is in {self.checkpoints.save_fault(step, run.state_dict())}"
            except CheckpointError as unsaved:
                sentence += f"; the state as it is now could not be saved: {unsaved}"
        return NonFiniteError(sentence, step=step)

    def _leave(self, interruption: Interruption) -> None:
        assert interruption.received is not None
        assert self.checkpoints is not None
        name, run = interruption.received.name, self.run
        print(
            f"mlopt: {name}: step {run.step} of {run.steps} is finished and saved in {self.checkpoints.folder}; resume=True "
            "(--resume on the command line) goes on from there",
            file=sys.stderr,
        )
        raise Interrupted(0 if name == "SIGTERM" else 130)

    def _end(self, error: BaseException | None) -> None:
        """Let every callback end, also where one cannot; what ends the run already is not to be hidden by that."""
        failures = []
        for watcher in self.watchers:
            try:
                watcher.on_train_end(self.run)
            except Exception as failure:
                failures.append(failure)
        if failures and error is None:
            raise failures[0]
        if error is not None:
            for also in failures:
                error.add_note(f"and at its end: {also!r}")

    def _call(self, hook: str, *arguments: Any) -> None:
        if not self.watchers:
            return
        # How often these are called depends on how often the run is logged and saved: what they draw must not be training's.
        apart = hook in ("on_evaluate", "on_log", "on_save")
        with preserved(self.run.problem.devices) if apart else contextlib.nullcontext(), at_once():
            for watcher in self.watchers:
                getattr(watcher, hook)(self.run, *arguments)
