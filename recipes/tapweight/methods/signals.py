"""Measure the signals of the objectives during a run, on disjoint halves of the validation labels."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import torch

import mlopt

from ..significance import Signal, judge
from .levels import Chunks
from .weights import relative_signals

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

    from torch import Tensor

    from mlopt.problem import Stream

__all__ = ["SignalMeter"]


class SignalMeter(mlopt.Callback):
    """Collect every objective's signal at each step, and measure it at intervals on two halves of the validation examples.

    A step's signal comes from the gradient that the weights move by. A half's signal is the hypergradient with that half as
    the validation batch; both halves see the same pretraining and finetuning batches and the same masks, so that only
    the labels differ. New halves are drawn each time.

    Args:
        names: the objectives' names, in the order of their weights.
        valid: the validation examples.
        keys: the identity of each; the rows of one example are in the same half.
        collate: joins examples into a batch.
        streams: pretraining and finetuning batches of the meter's own, by level name.
        start: outer steps before the first interval.
        interval: outer steps between measurements.
        limit: the most examples in a half.
        batch_size: validation examples that are taken at once, which bounds the memory.
        seed: the seed of the halves.
    """

    reads_gradients: ClassVar[bool] = False  # that of the outermost level stays in any case

    def __init__(
        self,
        names: Sequence[str],
        valid: Sequence[Any],
        keys: Sequence[Hashable],
        collate: Callable[[list[Any]], Any],
        streams: Mapping[str, Stream],
        *,
        start: int,
        interval: int,
        limit: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.names, self._valid, self._keys, self._collate, self._streams = names, valid, keys, collate, streams
        self._start, self._interval, self._limit, self._batch_size = start, interval, limit, batch_size
        self._generator = torch.Generator().manual_seed(seed)
        #: For each interval, the mean signal of its steps, (K,), and the signals of two halves at its end.
        self.means: list[Tensor] = []
        self.halves: list[tuple[Tensor, Tensor]] = []
        self._steps: list[Tensor] = []

    def on_step_end(self, run: Any) -> None:
        elapsed = run.step - self._start
        if elapsed <= 0:
            return
        gradient = run.problem["reweighting"].module.logits.grad
        if gradient is not None:  # None if the step was not taken
            weights = torch.stack([run.engine.logs[f"reweighting/weight/{name}"] for name in self.names])
            self._steps.append(relative_signals(gradient, weights))
        if elapsed % self._interval == 0 and self._steps:
            # After a resume, the signals of the steps before it are on the CPU.
            self.means.append(torch.stack([step.to(self._steps[-1]) for step in self._steps]).mean(0).cpu())
            self._steps = []
            self.halves.append(self._measure(run.problem))

    def _measure(self, problem: mlopt.Problem) -> tuple[Tensor, Tensor]:
        rows: dict[Hashable, list[int]] = {}
        for index in torch.randperm(len(self._valid), generator=self._generator).tolist():
            rows.setdefault(self._keys[index], []).append(index)
        order, size = list(chain(*rows.values())), min(len(self._valid) // 2, self._limit)
        last = rows[self._keys[order[size - 1]]]
        start = order.index(last[0])
        # The first half holds all rows of its last example, or none of them if no other example would be left.
        border = next((end for end in (start + len(last), start) if 0 < end < len(order)), size)
        batches = {name: stream.next() for name, stream in self._streams.items()}
        seed = int(torch.randint(2**31, (), generator=self._generator))
        weights = problem["reweighting"].module().detach()
        signals = []
        for half in (order[:border], order[border : border + size]):
            pieces = (half[k : k + self._batch_size] for k in range(0, len(half), self._batch_size))
            chunks = Chunks(self._collate([self._valid[i] for i in piece]) for piece in pieces)
            result = mlopt.hypergradient(problem, {**batches, "reweighting": chunks}, seed=seed)
            signals.append(relative_signals(result.gradient["logits"], weights).cpu())
        return signals[0], signals[1]

    def state_dict(self) -> dict[str, Any]:
        return {
            "means": self.means,
            "halves": self.halves,
            "steps": self._steps,
            "generator": self._generator.get_state(),
            "streams": {name: stream.state_dict() for name, stream in self._streams.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.means, self.halves, self._steps = list(state["means"]), list(state["halves"]), list(state["steps"])
        self._generator.set_state(state["generator"])
        for name, stream in self._streams.items():
            stream.load_state_dict(state["streams"][name])

    def signals(self) -> dict[str, Signal]:
        """Return the signal of each objective over the run so far."""
        return judge(self.names, self.means, self.halves)
