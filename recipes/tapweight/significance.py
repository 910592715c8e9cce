"""Significance of weights: a signal of each objective, its error, and a verdict."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import attrs
import torch
from scipy.special import stdtrit

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

__all__ = ["Signal", "compare", "errors_of_shares", "judge", "resampled_means", "shares_of_best", "verdict"]

_RESAMPLES = 2_000
#: Means that differ by less, relative to the losses, are equal but for rounding.
_TIE = 1e-12
#: Resamples that are drawn at once, which bounds the memory.
_CHUNK = 200


@attrs.frozen
class Signal:
    """The comparison of an objective with the average of all, over a run; see `compare` and `judge`.

    Attributes:
        mean: positive if the objective helps more than the average.
        error: its standard error, the scatter of the labels included.
        z: mean / error.
        significant: True if |z| passes a two-sided test at 5% for all objectives together.
        weight_error: the standard error of the objective's weight, see `errors_of_shares`; None if the weight is not a share of
            resamples.
    """

    mean: float
    error: float
    z: float
    significant: bool
    weight_error: float | None = None

    @property
    def cells(self) -> tuple[str, str]:
        """The cells of a table: mean / error, and the verdict in a word."""
        return f"{self.z:+.1f}", ("helps" if self.mean > 0 else "harms") if self.significant else "no"


def shares_of_best(losses: Tensor, seed: int) -> Tensor:
    """Return the share of the bootstrap resamples of n examples in which each of K candidates has the smallest mean loss, (K,).

    Candidates of one loss share a resample.

    Args:
        losses: of each candidate on each example, (K, n).
        seed: the seed of the resamples.

    Example:
        >>> import torch
        >>> from mlopt.recipes.tapweight.significance import shares_of_best
        >>> losses = torch.tensor([[1.0, 2.0, 3.0], [1.1, 2.1, 3.1]])
        >>> shares_of_best(losses, seed=0).tolist()
        [1.0, 0.0]

    Source: Breiman, "Bagging predictors", Machine Learning 1996, of a choice by leave-one-out loss.
    """
    best = _best(losses, seed)
    return best.sum(0) / len(best)


def errors_of_shares(losses: Tensor, seed: int) -> Tensor:
    """Return the standard error of each share of `shares_of_best` over draws of the examples, from the same resamples, (K,).

    With N_bi the number of times that resample b of B holds example i of n, and t_bk the share of candidate k in it,

        error_k^2 = sum_i cov_b(N_bi, t_bk)^2 - n var_b(t_bk) / B

    The sum is the infinitesimal jackknife of the mean over resamples, and the last term its bias with B resamples.

    Args:
        losses: of each candidate on each example, (K, n).
        seed: the seed of the resamples.

    Source: Efron, "Estimation and accuracy after model selection", JASA 2014; Wager, Hastie & Efron, "Confidence intervals for
    random forests: the jackknife and the infinitesimal jackknife", JMLR 2014.
    """
    best, count = _best(losses, seed), losses.shape[1]
    centred = best - best.mean(0)
    covariances = torch.zeros(count, len(losses), dtype=torch.float64)
    for times, part in zip(_resamples(count, seed), centred.reshape(-1, _CHUNK, len(losses)), strict=True):
        covariances += times.T @ part / len(best)
    bias = count / len(best) * centred.square().mean(0)
    return (covariances.square().sum(0) - bias).clamp(min=0).sqrt()


def _best(losses: Tensor, seed: int) -> Tensor:
    """Return the share of each candidate in each resample, (resamples, K): 1 for the best; candidates of one loss share it."""
    means = resampled_means(losses, seed)
    best = (means <= means.amin(1, keepdim=True) + _TIE * losses.double().abs().mean()).double()
    return best / best.sum(1, keepdim=True)


def compare(names: Sequence[str], losses: Tensor, seed: int) -> dict[str, Signal]:
    """Return how the loss of each of K candidates compares with the mean over the candidates, on the same n examples.

    With d_ki = mean_j l_ji - l_ki, the signal is mean_i d_ki, and its error the standard deviation of that mean over bootstrap
    resamples of the examples. A candidate is significant if |mean / error| exceeds the 95% quantile, over resamples, of the
    largest deviation of any candidate from its own mean in units of its error. This bounds the probability of any false finding
    by 5%, whatever the correlation of the candidates.

    Args:
        names: K names.
        losses: of each candidate on each example, (K, n).
        seed: the seed of the resamples.

    Source: Romano & Wolf, "Stepwise multiple testing as formalized data snooping", Econometrica 2005 (its first step).
    """
    differences = losses.double().mean(0) - losses.double()
    means, resampled = differences.mean(1), resampled_means(differences, seed)
    errors = resampled.std(0, correction=0)
    # Candidates that never differ have no error, and are not significant.
    clear = errors > _TIE * losses.double().abs().mean()
    deviations = torch.where(clear, (resampled - means).abs() / errors, 0.0).amax(1)
    threshold = float(deviations.quantile(0.95))
    weight_errors = errors_of_shares(losses, seed).tolist()
    signals = {}
    for k, name in enumerate(names):
        mean, error = float(means[k]), float(errors[k])
        z = mean / error if clear[k] else 0.0
        signals[name] = Signal(
            mean=mean, error=error, z=z, significant=abs(z) > threshold, weight_error=weight_errors[k]
        )
    return signals


def resampled_means(losses: Tensor, seed: int) -> Tensor:
    """Return the mean of each row of a matrix (K, n) over bootstrap resamples of its columns, (resamples, K)."""
    count = losses.shape[1]
    return torch.cat([times @ losses.double().T / count for times in _resamples(count, seed)])


def _resamples(count: int, seed: int) -> Iterator[Tensor]:
    """Yield how often each of n examples is in each of some resamples, (_CHUNK, n), until there are `_RESAMPLES`."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(_RESAMPLES // _CHUNK):
        drawn = torch.randint(count, (_CHUNK, count), generator=generator)
        yield torch.zeros(_CHUNK, count, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())


def judge(names: Sequence[str], means: Sequence[Tensor], halves: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Signal]:
    """Return the signal of each objective over T intervals of a run.

    The signal of a step is s_k - sum_j lambda_j s_j, s_k = -dL_valid/dlambda_k. With m_t the mean signal of an interval's steps
    and a_t, b_t the signals of two halves of the labels at its end, the signal of the run is mean_t m_t. Half the difference of
    two halves scatters as the mean over all labels does, and the labels are the same at every t, so that part of the error does
    not shrink with T. The scatter from interval to interval (batches, masks, the drift of the run) does shrink:
    error^2 = mean_t ((a_t - b_t)/2)^2 + var_t(m_t) / T.

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
    threshold = float(stdtrit(len(halves) - 1, 1 - 0.025 / len(names)))
    signals = {}
    for name, m, e in zip(names, mean.tolist(), error.tolist(), strict=True):
        z = m / e if e > 0 else 0.0
        signals[name] = Signal(mean=m, error=e, z=z, significant=abs(z) > threshold)
    return signals


def verdict(signals: Mapping[str, Signal]) -> str:
    """Return a sentence on the objectives that the validation labels significantly prefer, if any."""
    if not signals:
        return "This run did not measure how the objectives compare."
    helps = [name for name, signal in signals.items() if signal.significant and signal.mean > 0]
    harms = [name for name, signal in signals.items() if signal.significant and signal.mean < 0]
    if not helps and not harms:
        return (
            "This run shows no significant preference of the task among these objectives: their differences are within the "
            "noise of the run and of its labels."
        )
    parts = []
    if helps:
        parts.append(f"{', '.join(helps)} helped significantly more than the average objective")
    if harms:
        parts.append(f"{', '.join(harms)} helped significantly less")
    rest = [name for name in signals if name not in (*helps, *harms)]
    tail = f"; {', '.join(rest)} cannot be distinguished from the average" if rest else ""
    return f"By the labels of the task, {' and '.join(parts)}{tail}."
