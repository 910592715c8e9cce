"""A run in progress and its state."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, CheckpointWarning
from ..problem import Problem
from ..rng import GeneratorState
from .compatibility import describe, require_compatible
from .engine import Engine
from .history import History

if TYPE_CHECKING:
    from .callbacks import Callback

__all__ = ["Run"]


class Run:
    """A run in progress, the argument of callbacks.

    Args:
        problem: the problem.
        steps: outer steps in total.
        seed: seed of the order of the data.
        callbacks: their state is saved with the run.
        lookahead: see `mlopt.solve`.
        skip_limit: number of non-finite steps that may be skipped.

    Attributes:
        problem: the problem.
        steps: outer steps in total.
        step: outer steps taken.
        history: a row for each step taken.
        engine: optimisers, schedulers and data streams of the levels.
        status: the reason why the run ended; None while it is in progress.
        logged: rows of the history that were passed to `on_log`.
        rollbacks: outer steps that were rolled back because a value was not finite.
    """

    def __init__(
        self,
        problem: Problem,
        steps: int,
        seed: int,
        callbacks: Sequence[Callback] = (),
        *,
        lookahead: bool = False,
        skip_limit: int = 0,
    ) -> None:
        self.problem, self.steps, self.step, self.seed = problem, steps, 0, seed
        self.history = History()
        keep = any(callback.reads_gradients for callback in callbacks)
        self.engine = Engine(problem, seed, lookahead=lookahead, skip_limit=skip_limit, keep_gradients=keep)
        self.status: str | None = None
        self.rollbacks = self.logged = 0
        self._callbacks = callbacks
        self._description = describe(problem, self.engine.optimizers, self.engine.schedulers, lookahead=lookahead)

    def stop(self, reason: str) -> None:
        """End the run after the current step; the reason becomes the status."""
        self.status = reason

    def state_dict(self) -> dict[str, Any]:
        """Return the state that later steps depend on: tensors, numbers, strings, and lists and mappings of these."""
        callbacks = [{"kind": type(c).__name__, "state": c.state_dict()} for c in self._callbacks]
        return {
            "problem": self._description,
            "seed": self.seed,
            "step": self.step,
            "status": self.status,
            "rollbacks": self.rollbacks,
            "history": list(self.history),
            "engine": self.engine.state_dict(),
            "logged": self.logged,
            "callbacks": callbacks,
            "generators": GeneratorState.capture(self.problem.devices).state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, seed: int | None) -> GeneratorState:
        """Load a state that `state_dict` returned.

        Args:
            state: the state.
            seed: the seed that the run must have; any seed if None.

        Returns:
            The saved state of the random generators, to be restored last.

        Raises:
            CheckpointError: the state belongs to another problem or another seed.
        """
        require_compatible(self._description, state["problem"])
        if seed is not None and seed != state["seed"]:
            raise CheckpointError(f"the checkpoint has seed={state['seed']}, not {seed}; give that seed")
        if state["step"] > self.steps:
            raise CheckpointError(
                f"the checkpoint is of step {state['step']}, beyond steps={self.steps}; give at least as many steps"
            )
        self.seed, self.step, self.status = state["seed"], state["step"], state["status"]
        self.rollbacks, self.logged = state["rollbacks"], state["logged"]
        for row in state["history"]:
            self.history.append(row)
        self.engine.load_state_dict(state["engine"])
        self._load_callbacks(state["callbacks"])
        return GeneratorState.from_state_dict(state["generators"])

    def _load_callbacks(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Load the states of callbacks; match callbacks of one class in their order."""
        remaining = list(self._callbacks)
        for entry in saved:
            callback = next((c for c in remaining if type(c).__name__ == entry["kind"]), None)
            if callback is not None:
                remaining = [c for c in remaining if c is not callback]
                if entry["state"]:
                    callback.load_state_dict(entry["state"])
            elif entry["state"]:
                warnings.warn(
                    f"the checkpoint holds the state of a callback {entry['kind']}, but the run has no such callback",
                    CheckpointWarning,
                    stacklevel=6,
                )
