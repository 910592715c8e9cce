"""Callbacks made of functions, and runs that pass rows to callbacks as `solve` does, without a problem."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from mlopt.solving import Callback, History

__all__ = ["after_each_step", "callback", "play", "play_on", "play_until_killed"]

Rows = Sequence[dict[str, float]]


def callback(**hooks: Callable[..., Any]) -> Callback:
    """Return a callback with these hooks, for example `on_step_end=lambda run: ...`."""
    watcher = Callback()
    for name, hook in hooks.items():
        assert hasattr(watcher, name), name
        setattr(watcher, name, hook)
    return watcher


def after_each_step(act: Callable[[str, Any], Any]) -> Callback:
    """Return a callback that calls `act` with the level's name and the run after each step of each level."""

    def on_train_begin(run: Any) -> None:
        for level, optimizer in run.engine.optimizers.items():
            optimizer.register_step_post_hook(lambda *_, level=level: act(level, run))

    return callback(on_train_begin=on_train_begin)


def play(
    rows: Rows,
    make: Callable[[], Callback],
    *,
    log_every: int = 1,
    save_at: int = 0,
    killed_at: int = 0,
    status: str = "completed",
) -> Any:
    """Pass rows to a callback; return the run.

    A row's columns "evaluation/..." are an evaluation after that step. The order within a step is: step, evaluation, log,
    checkpoint. With `killed_at` the run is killed after that many steps, and resumed from the checkpoint of `save_at` by a
    new callback that gets only the saved state.
    """
    saved = play_until_killed(rows, make, log_every, save_at, killed_at) if killed_at else None
    return play_on(rows, make, saved, log_every, status)


def play_until_killed(rows: Rows, make: Callable[[], Callback], log_every: int, save_at: int, killed_at: int) -> Any:
    """Pass the first rows, without ending the run; return the content of a checkpoint after `save_at` steps."""
    watch, run = make(), _run(rows, [])
    watch.on_train_begin(run)
    _steps(rows, watch, run, log_every, range(save_at))
    assert run.status is None, "the run stopped before the checkpoint"
    saved = copy.deepcopy((watch.state_dict(), list(run.history)))
    _steps(rows, watch, run, log_every, range(save_at, killed_at))
    return saved


def play_on(rows: Rows, make: Callable[[], Callback], saved: Any, log_every: int, status: str = "completed") -> Any:
    """Pass the rows after a checkpoint, and end the run; return it."""
    state, earlier = saved or (None, [])
    watch, run = make(), _run(rows, earlier)
    if state is not None:
        watch.load_state_dict(state)
    watch.on_train_begin(run)
    _steps(rows, watch, run, log_every, range(len(earlier), len(rows)))
    if run.step % log_every:
        watch.on_log(run, [run.history[i] for i in range(run.step - run.step % log_every, run.step)])
    run.status = run.status or status
    watch.on_train_end(run)
    return run


def _run(rows: Rows, earlier: Rows) -> Any:
    run = SimpleNamespace(steps=len(rows), step=len(earlier), history=History(), status=None)
    run.stop = lambda reason: setattr(run, "status", reason)
    for row in earlier:
        run.history.append(row)
    return run


def _steps(rows: Rows, watch: Callback, run: Any, log_every: int, span: range) -> None:
    for index in span:
        if run.status is not None:
            return
        watch.on_step_begin(run)
        run.step = index + 1
        run.history.append({"step": run.step, **rows[index]})
        watch.on_step_end(run)
        metrics = {k.removeprefix("evaluation/"): v for k, v in rows[index].items() if k.startswith("evaluation/")}
        if metrics:
            watch.on_evaluate(run, metrics)
        if run.step % log_every == 0:
            watch.on_log(run, [run.history[i] for i in range(run.step - log_every, run.step)])
