"""A workspace: caches and counters that the evaluations of a problem share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..rng import derive_seed
from .stream import Stream

if TYPE_CHECKING:
    from .level import Level

__all__ = ["Workspace"]


class Workspace:
    """The caches of a problem, and the data streams and the count of standalone calls of `hypergradient`.

    A problem holds one. An evaluation that must not change it uses a fresh one.

    Attributes:
        calls: number of standalone calls so far; it seeds the random numbers of a call without a seed.
        mixtures: for each level whose loss has been evaluated, the level that weighs it, or None if it is not a `Mixture`.
        compiled: by level and part of its objective, the product with its Hessian that torch.compile returned; with "autograd"
            as a third key, the recorded products by blocks and setting. None if they were wrong.
        optimizers: by level, the optimiser that its factory made outside a run, to read its options.
        rules: by level, the sign and the decay that were read off the steps of an optimiser of unknown kind.
        verified: checks that were made and need no repetition: the name of a check, then what it was made for.
        settled: kinds of products that were compared with differences without a doubt: class, label of the term, and blocks.
        doubts: by key of a check that failed, a sentence. The key for a loss is "loss", the level, the level that it refers to
            (or itself), and the part of the objective.
        verifying: True while products are checked, so that no check starts another.
        uses: by compiled product and shapes of its arguments, the number of calls; by term, the number of traces.
        lengths: by term and blocks, the steps of differences that were measured: groups of variables with a least norm, the
            disagreement of two steps, whether the variables are small, and the factor on the steps.
        evaluations: by level and part of its objective, the number of evaluations that were inspected.
        drawing: on several processes, by level whose loss draws random numbers, the devices of the problem.
        counted: on several processes, by level and loss, in the order of evaluation, whether the loss states a count.
        busy: while a solution is formed or differentiated, the "thread" that does so, and the "depth" of its calls.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._streams: dict[str, Stream] = {}
        #: States of streams that have not been opened since the run was resumed.
        self._states: dict[str, Any] = {}
        self.mixtures: dict[str, str | None] = {}
        self.compiled: dict[tuple[str, ...], Any] = {}
        self.optimizers: dict[str, Any] = {}
        self.rules: dict[str, list[Any]] = {}
        self.verified: set[tuple[str, ...]] = set()
        self.settled: set[tuple[Any, ...]] = set()
        self.doubts: dict[tuple[str, ...], str] = {}
        self.verifying = False
        self.uses: dict[tuple[str, ...], int] = {}
        self.lengths: dict[str, tuple[Any, ...]] = {}
        self.evaluations: dict[tuple[str, str], int] = {}
        self.drawing: dict[str, tuple[torch.device, ...]] = {}
        self.counted: dict[tuple[str, str], bool] = {}
        self.busy: dict[str, int] = {}

    def next_batch(self, level: Level) -> Any:
        """Return the next batch of a level for a standalone call."""
        return self.stream(level, level.data).next()

    def stream(self, level: Level, data: Any, kind: str = "data") -> Stream:
        """Return the stream of batches for standalone calls, from which training does not draw.

        Args:
            level: the level.
            data: the level's batches of that kind.
            kind: "data", "curvature data" or "response".
        """
        key = level.name if kind == "data" else f"{level.name}/{kind}"
        if key not in self._streams:
            self._streams[key] = Stream(key, data, derive_seed("hypergradient", 0), level.device)
            if key in self._states:
                self._streams[key].load_state_dict(self._states.pop(key))
        return self._streams[key]

    def forget(self, level: str) -> None:
        """Drop the steps of differences, and the compiled products of a level, because it has other variables now."""
        self.lengths.clear()  # an entry may be of the blocks of several levels
        self.compiled = {key: code for key, code in self.compiled.items() if key[0] != level}

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle the state alone: loaders' iterators refuse it, and compiled products hold the original's modules."""
        return Workspace, (), self.state_dict()

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the standalone calls and the steps of differences; other caches are not part of it."""
        streams = {key: stream.state_dict() for key, stream in self._streams.items()}
        return {"calls": self.calls, "streams": self._states | streams, "lengths": dict(self.lengths)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the standalone calls and the steps of differences to a state that `state_dict` returned; other caches are kept."""
        self.calls, self._states = state["calls"], dict(state["streams"])
        self.lengths = dict(state.get("lengths", {}))
        self._streams.clear()
