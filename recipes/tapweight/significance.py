"""Significance of weights: a signal of each objective, its error, and a verdict."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

import attrs
import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

__all__ = ["Signal", "judge", "verdict"]


@attrs.frozen
class Signal:
    """The comparison of an objective with the mixture, over a run.

    Attributes:
        mean: mean of s_k - sum_j lambda_j s_j, s_k = -dL_valid/dlambda_k; positive if more of the objective helps.
        error: its standard error, the scatter between halves of the validation labels included.
        z: mean / error.
        significant: True if |z| passes a two-sided t test at 5% for all objectives together (Bonferroni).
    """

    mean: float
    error: float
    z: float
    significant: bool

    @property
    def cells(self) -> tuple[str, str]:
        """The cells of a table: mean / error, and the verdict in a word."""
        return f"{self.z:+.1f}", ("helps" if self.mean > 0 else "harms") if self.significant else "no"


def judge(names: Sequence[str], means: Sequence[Tensor], halves: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Signal]:
    """Return the signal of each objective over T intervals of a run.

    With m_t the mean signal of an interval's steps and a_t, b_t the signals of two halves of the labels at its end, the
    signal is mean_t m_t. Half the difference of two halves scatters as the mean over all labels does, and the labels are the
    same at every t, so that part of the error does not shrink with T. The scatter from interval to interval (batches, masks,
    the drift of the run) does shrink: error^2 = mean_t ((a_t - b_t)/2)^2 + var_t(m_t) / T.

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
    """Return a sentence on the objectives that the validation labels significantly prefer, if any."""
    if not signals:
        return "This run did not measure how the objectives compare."
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
    tail = f"; {', '.join(rest)} cannot be distinguished from the mixture" if rest else ""
    return f"By the validation labels, {' and '.join(parts)}{tail}."
