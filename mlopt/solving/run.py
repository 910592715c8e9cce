"""A run in progress, and its state."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, CheckpointWarning
from ..problem import Problem
from ..rng import GeneratorState
from .description import compare, described
from .engine import Engine
from .history import History

if TYPE_CHECKING:
    from .callbacks import Callback

__all__ = ["Run"]


class Run:
    """A run in progress, as callbacks see it.

    Args:
        problem: the problem.
        steps: outer steps asked for.
        seed: of the order of every level's data.
        callbacks: whose state is the run's, too.
        lookahead: see `mlopt.solve`.
        skips: how many steps that are not finite may be left out.

    Attributes:
        problem: the problem.
        steps: outer steps asked for.
        step: outer steps taken.
        history: a row for each step taken.
        engine: optimisers, schedulers and data streams of the levels.
        status: why the run ended; None while it goes on.
        logged: how many rows of the history have been handed to `on_log`.
        rollbacks: outer steps that were taken back because something in them was not finite.
    """

    def __init__(
        self,
        problem: Problem,
        steps: int,
        seed: int,
        callbacks: Sequence[Callback] = (),
        *,
        lookahead: bool = False,
        skips: int = 0,
    ) -> None:
        self.problem, self.steps, self.step, self.seed = problem, steps, 0, seed
        self.history = History()
        self.engine = Engine(problem, seed, lookahead=lookahead, skips=skips)
        self.status: str | None = None
        self.rollbacks = self.logged = 0
        self._callbacks = callbacks
        self._description = described(problem, self.engine.optimizers, self.engine.schedulers, lookahead=lookahead)

    def stop(self, reason: str) -> None:
        """End the run after the present step; the reason becomes the status."""
        self.status = reason

    def state_dict(self) -> dict[str, Any]:
        """Return all that a later part of the run depends on, as tensors, numbers, text, lists and mappings of these."""
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
        """Go where `state_dict` said; return where the generators are to be put, last of all.

        Args:
            state: what it returned.
            seed: that the run to go on with must have had; any when None.

        Raises:
            CheckpointError: it is the state of another problem, or of another seed.
        """
        compare(self._description, state["problem"])
        if seed is not None and seed != state["seed"]:
            raise CheckpointError(f"the checkpoint is of a run with seed={state['seed']}, not {seed}; give that seed")
        if state["step"] > self.steps:
            raise CheckpointError(
                f"the checkpoint is of step {state['step']}, and steps={self.steps} are asked for; ask for at least as many"
            )
        self.seed, self.step, self.status = state["seed"], state["step"], state["status"]
        self.rollbacks, self.logged = state["rollbacks"], state["logged"]
        for row in state["history"]:
            self.history.append(row)
        self.engine.load_state_dict(state["engine"])
        waiting = {id(callback): callback for callback in self._callbacks}
        for carried in state["callbacks"]:
            heir = next((c for c in waiting.values() if type(c).__name__ == carried["kind"]), None)
            if heir is None and carried["state"]:
                warnings.warn(
                    f"the checkpoint holds the state of a callback {carried['kind']}, which is not among those given now",
                    CheckpointWarning,
                    stacklevel=4,
                )
            elif heir is not None:
                # Those of one kind in their order.
                del waiting[id(heir)]
                if carried["state"]:
                    heir.load_state_dict(carried["state"])
        return GeneratorState.from_state_dict(state["generators"])
