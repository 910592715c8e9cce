"""Comparisons of methods: paired tests over seeds, Holm's correction, ranks over tasks with Friedman's and Nemenyi's tests."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import attrs

__all__ = ["Ranking", "correlation", "friedman", "holm", "nemenyi", "paired_t", "ranks", "wilcoxon"]


def paired_t(differences: Sequence[float]) -> float:
    """Return the two-sided p of Student's paired t test that the mean difference is zero.

    t = mean / (s / sqrt(n)) with n - 1 degrees of freedom. Seeds draw their splits from the same examples, so their differences
    are not quite independent, and p is somewhat too small (Nadeau & Bengio, Machine Learning 2003).

    Args:
        differences: one for each seed. With fewer than two the p is 1; so it is if all are zero.
    """
    if len(differences) < 2:
        return 1.0
    mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
    if deviation == 0:
        return 1.0 if mean == 0 else 0.0
    from scipy.stats import t

    return float(2 * t.sf(abs(mean) / deviation * math.sqrt(len(differences)), len(differences) - 1))


def wilcoxon(differences: Sequence[float]) -> float:
    """Return the two-sided p of Wilcoxon's signed-rank test, exact for few differences; zeros are left out.

    Five differences of one sign have p = 2 / 2^5 = 0.0625, the smallest that five seeds can have.
    """
    nonzero = [difference for difference in differences if difference]
    if not nonzero:
        return 1.0
    from scipy.stats import wilcoxon as test

    return float(test(nonzero).pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """Return p values adjusted so that the chance of any false rejection among them is at most the level.

    The i-th smallest of m is multiplied by m - i + 1, and is at least as large as the one before it.

    Source: Holm, Scandinavian Journal of Statistics 1979.
    """
    adjusted, largest = [0.0] * len(values), 0.0
    for i, k in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - i) * values[k]))
        adjusted[k] = largest
    return adjusted


def ranks(scores: Mapping[str, float], *, greater_is_better: bool) -> dict[str, float]:
    """Return the rank of each method on one task: 1 is best, equal scores share the mean of their ranks."""
    sign = -1 if greater_is_better else 1
    values = [sign * score for score in scores.values()]
    return {
        name: 1 + sum(other < value for other in values) + (values.count(value) - 1) / 2
        for name, value in zip(scores, values, strict=True)
    }


def friedman(blocks: Sequence[Mapping[str, float]]) -> float:
    """Return the p of Friedman's test that all methods have the same mean rank.

    Args:
        blocks: the ranks of the same k methods on each of n tasks. With fewer than two tasks or three methods the p is 1.
    """
    names = list(blocks[0]) if blocks else []
    if len(blocks) < 2 or len(names) < 3:
        return 1.0
    from scipy.stats import friedmanchisquare

    return float(friedmanchisquare(*([block[name] for block in blocks] for name in names)).pvalue)


def nemenyi(methods: int, tasks: int, level: float = 0.05) -> float:
    """Return Nemenyi's critical difference of mean ranks: q sqrt(k (k + 1) / (6 n)).

    q is the quantile of the studentised range of k methods, over sqrt(2).

    Source: Demsar, Journal of Machine Learning Research 2006.
    """
    from scipy.stats import studentized_range

    q = float(studentized_range.ppf(1 - level, methods, math.inf)) / math.sqrt(2)
    return q * math.sqrt(methods * (methods + 1) / (6 * tasks))


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Pearson's correlation; NaN if one of the two is constant."""
    try:
        return statistics.correlation(x, y)
    except statistics.StatisticsError:
        return math.nan


@attrs.frozen
class Ranking:
    """Mean ranks of methods over tasks.

    Attributes:
        means: the mean rank of each method, the best first.
        tasks: the number of tasks.
        p: of Friedman's test.
        critical: Nemenyi's critical difference at 5%; NaN with fewer than two methods.
    """

    means: dict[str, float]
    tasks: int
    p: float
    critical: float

    @classmethod
    def of(cls, blocks: Sequence[Mapping[str, float]]) -> Ranking:
        """Return the ranking from the ranks of the same methods on each task."""
        means = {name: statistics.fmean(block[name] for block in blocks) for name in blocks[0]}
        critical = nemenyi(len(means), len(blocks)) if len(means) > 1 else math.nan
        return cls(dict(sorted(means.items(), key=lambda item: item[1])), len(blocks), friedman(blocks), critical)

    def groups(self) -> list[list[str]]:
        """Return the longest runs of two or more methods whose mean ranks differ by less than the critical difference."""
        names, runs = list(self.means), []
        for start, first in enumerate(names):
            run = [name for name in names[start:] if self.means[name] - self.means[first] < self.critical]
            if len(run) > 1 and not (runs and set(run) <= set(runs[-1])):
                runs.append(run)
        return runs
