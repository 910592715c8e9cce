"""The tests of significance, held against scipy, hand-computed cases and the tables of their papers."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

from benchmarks.tapweight.comparison import (
    Ranking,
    correlation,
    friedman,
    holm,
    nemenyi,
    paired_t,
    ranks,
    wilcoxon,
)


def test_the_paired_t_test_is_that_of_scipy() -> None:
    x, y = torch.randn(2, 7, generator=torch.Generator().manual_seed(0)).tolist()
    expected = scipy.stats.ttest_rel(x, y).pvalue
    assert paired_t([a - b for a, b in zip(x, y, strict=True)]) == pytest.approx(expected, rel=1e-12)


def test_the_paired_t_test_by_hand() -> None:
    """Differences 1, 2, 3: t = 2 sqrt(3) with two degrees of freedom, whose tail is 1/2 - t / (2 sqrt(2 + t^2))."""
    t = 2 * math.sqrt(3)
    assert paired_t([1.0, 2.0, 3.0]) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-12)


@pytest.mark.parametrize(("differences", "p"), [([], 1.0), ([0.3], 1.0), ([0.0, 0.0], 1.0), ([0.5, 0.5], 0.0)])
def test_differences_without_a_deviation(differences: list[float], p: float) -> None:
    assert paired_t(differences) == p


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1.0, 2.0, 3.0, 4.0, 5.0], 2 / 2**5),
        # Sums of negative ranks at most 1: none, or the smallest one.
        ([-1.0, 2.0, 3.0, 4.0], 2 * 2 / 2**4),
        ([0.0, 0.0], 1.0),
        ([0.0, 1.0, 2.0], 2 / 2**2),
    ],
)
def test_the_signed_rank_test_counts_signs(differences: list[float], p: float) -> None:
    assert wilcoxon(differences) == pytest.approx(p)


def test_holms_correction_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_ranks_share_ties_and_follow_the_direction() -> None:
    scores = {"a": 0.9, "b": 0.7, "c": 0.9, "d": 0.1}
    assert ranks(scores, greater_is_better=True) == {"a": 1.5, "b": 3, "c": 1.5, "d": 4}
    assert ranks(scores, greater_is_better=False) == {"a": 3.5, "b": 2, "c": 3.5, "d": 1}
    values = torch.randint(0, 4, (9,), generator=torch.Generator().manual_seed(1)).tolist()
    own = ranks({str(k): float(value) for k, value in enumerate(values)}, greater_is_better=False)
    assert list(own.values()) == scipy.stats.rankdata(values).tolist()


def test_friedmans_test_by_hand() -> None:
    """Three methods in one order on four tasks: chi^2 = 12 n / (k (k + 1)) sum (mean - (k + 1) / 2)^2 = 8, p = exp(-4)."""
    assert friedman([{"a": 1.0, "b": 2.0, "c": 3.0}] * 4) == pytest.approx(math.exp(-4))
    assert friedman([{"a": 1.0, "b": 2.0, "c": 3.0}]) == 1.0
    assert friedman([]) == 1.0


@pytest.mark.parametrize(("methods", "q"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (10, 3.164)])
def test_the_critical_difference_follows_the_table_of_demsar(methods: int, q: float) -> None:
    assert nemenyi(methods, 14) == pytest.approx(q * math.sqrt(methods * (methods + 1) / (6 * 14)), abs=1e-3)


def test_a_ranking_orders_methods_and_groups_those_that_are_not_apart() -> None:
    ranking = Ranking.of([{"b": 2.0, "a": 1.0, "c": 3.0, "d": 4.0}] * 10)
    assert ranking.means == {"a": 1, "b": 2, "c": 3, "d": 4}
    assert ranking.critical == pytest.approx(2.569 * math.sqrt(4 * 5 / 60), abs=1e-3)  # 1.48
    assert ranking.groups() == [["a", "b"], ["b", "c"], ["c", "d"]]
    assert Ranking.of([{"a": 1.0, "b": 2.0, "c": 3.0}] * 100).groups() == []


def test_the_correlation_of_a_constant_is_undefined() -> None:
    assert correlation([1.0, 2.0, 3.0], [2.0, 4.0, 7.0]) == pytest.approx(scipy.stats.pearsonr([1, 2, 3], [2, 4, 7])[0])
    assert math.isnan(correlation([1.0, 1.0], [0.0, 1.0]))
