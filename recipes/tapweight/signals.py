"""Whether the weights mean something: the signal of each objective, and its error, from disjoint halves of the labels."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any

import attrs
import torch

import mlopt

from .levels import Parts
from .weights import relative_signals

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from mlopt.problem import Stream

__all__ = ["Signal", "SignalMeter", "judge", "verdict"]


@attrs.frozen
class Signal:
    """How an objective compares with the mixture, over a run.

    Attributes:
        mean: of s_k - sum_j lambda_j s_j, s_k = -dL_valid/dlambda_k; positive where more of the objective helps.
        error: its standard error, the scatter between halves of the validation labels included.
        z: mean / error.
        significant: whether |z| passes a two-sided t test at 5% for all objectives together (Bonferroni).
    """

    mean: float
    error: float
    z: float
    significant: bool


class SignalMeter(mlopt.Callback):
    """Collects every objective's signal at each step, and now and then measures it on two halves of the validation examples.

    A step's signal comes from the gradient that the weights move by. A half's signal is the hypergradient with that half as
    the validation batch; both halves see the same pretraining and finetuning batches and the same masks, so that what tells
    them apart is the labels. The halves are drawn anew each time.

    Args:
        names: of the objectives, in the order of their weights.
        valid: the validation examples.
        collate: joins examples into a batch.
        streams: pretraining and finetuning batches of the meter's own, by level name.
        start: outer steps before the first interval.
        interval: outer steps between measurements.
        limit: the most examples in a half.
        batch_size: validation examples that are taken at once, which bounds the memory.
        seed: of the halves.
    """

    def __init__(
        self,
        names: Sequence[str],
        valid: Sequence[Any],
        collate: Callable[[list[Any]], Any],
        streams: Mapping[str, Stream],
        *,
        start: int,
        interval: int,
        limit: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.names, self._valid, self._collate, self._streams = names, valid, collate, streams
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
        if gradient is not None:  # of a step that was taken
            weights = torch.stack([run.engine.logs[f"reweighting/weight/{name}"] for name in self.names])
            self._steps.append(relative_signals(gradient, weights))
        if elapsed % self._interval == 0 and self._steps:
            self.means.append(torch.stack(self._steps).mean(0).cpu())
            self._steps = []
            self.halves.append(self._measure(run.problem))

    def _measure(self, problem: mlopt.Problem) -> tuple[Tensor, Tensor]:
        order = torch.randperm(len(self._valid), generator=self._generator).tolist()
        size = min(len(order) // 2, self._limit)
        batches = {name: stream.next() for name, stream in self._streams.items()}
        seed = int(torch.randint(2**31, (), generator=self._generator))
        weights = problem["reweighting"].module().detach()
        signals = []
        for half in (order[:size], order[size : 2 * size]):
            pieces = (half[k : k + self._batch_size] for k in range(0, size, self._batch_size))
            parts = Parts(self._collate([self._valid[i] for i in piece]) for piece in pieces)
            result = mlopt.hypergradient(problem, {**batches, "reweighting": parts}, seed=seed)
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


def judge(names: Sequence[str], means: Sequence[Tensor], halves: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Signal]:
    """Return the signal of each objective over T intervals of a run.

    With m_t the mean signal of an interval's steps and a_t, b_t the signals of two halves of the labels at its end, the
    signal is mean_t m_t. Half the difference of two halves scatters as the mean over all labels does, and the labels are the
    same at every t, so that part of the error does not shrink with T; what scatters from interval to interval (batches, masks,
    the drift of the run) does: error^2 = mean_t ((a_t - b_t)/2)^2 + var_t(m_t) / T.

    Args:
        names: K names.
        means: T tensors (K,).
        halves: T pairs of tensors (K,).
    """
    if len(halves) < 2:
        return {name: Signal(mean=0.0, error=math.inf, z=0.0, significant=False) for name in names}
    middle = torch.stack(list(means)).double()
    a, b = (torch.stack([pair[i] for pair in halves]).double() for i in (0, 1))
    mean = middle.mean(0)
    error = (((a - b) / 2).square().mean(0) + middle.var(0) / len(halves)).sqrt()
    threshold = _student_quantile(1 - 0.025 / len(names), len(halves) - 1)
    signals = {}
    for name, m, e in zip(names, mean.tolist(), error.tolist(), strict=True):
        z = m / e if e > 0 else 0.0
        signals[name] = Signal(mean=m, error=e, z=z, significant=abs(z) > threshold)
    return signals


def _student_quantile(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t, by its expansion about the normal one (Abramowitz & Stegun 26.7.5)."""
    x = statistics.NormalDist().inv_cdf(probability)
    first, second = (x**3 + x) / 4, (5 * x**5 + 16 * x**3 + 3 * x) / 96
    third = (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384
    return x + first / freedom + second / freedom**2 + third / freedom**3


def verdict(signals: Mapping[str, Signal]) -> str:
    """Return in words which objectives the validation labels prefer, or that they show no significant preference."""
    helps = [name for name, signal in signals.items() if signal.significant and signal.mean > 0]
    harms = [name for name, signal in signals.items() if signal.significant and signal.mean < 0]
    if not helps and not harms:
        return (
            "This run shows no significant preference of the task among these objectives: the differences of their weights are "
            "within the noise of its batches and of the validation labels."
        )
    parts = []
    if helps:
        parts.append(f"{', '.join(helps)} helped significantly more than the mixture")
    if harms:
        parts.append(f"{', '.join(harms)} helped significantly less")
    rest = [name for name in signals if name not in (*helps, *harms)]
    tail = f"; {', '.join(rest)} cannot be told from the mixture" if rest else ""
    return f"By the validation labels, {' and '.join(parts)}{tail}."
