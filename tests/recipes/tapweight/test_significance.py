"""Weights and verdicts from bootstrap resamples of losses."""

from __future__ import annotations

import math

import pytest
import torch
from tapweight_cases import F64

from mlopt.recipes.tapweight.exact_head import ridge_leave_one_out
from mlopt.recipes.tapweight.significance import compare, errors_of_shares, judge, shares_of_best


def test_the_share_of_resamples_is_the_probability_of_the_smaller_mean():
    """For two candidates the mean difference of a resample is nearly normal, which gives the share in closed form."""
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(2, 400, dtype=F64, generator=generator)
    losses[0] -= 0.02
    difference = losses[0] - losses[1]
    z = float(difference.mean() / (difference.std(correction=0) / math.sqrt(400)))
    expected = 0.5 * math.erfc(z / math.sqrt(2))
    share = float(shares_of_best(losses, seed=1)[0])
    # 2,000 resamples have a standard error of at most 0.011; the rest is the normal approximation.
    assert share == pytest.approx(expected, abs=0.045)
    assert 0.6 < share < 0.99


def test_equal_candidates_share_and_a_clear_winner_takes_all():
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(4, 300, dtype=F64, generator=generator)
    noise -= noise.mean(1, keepdim=True)
    shares = shares_of_best(noise, seed=0)
    assert bool(((shares - 0.25).abs() < 0.12).all())
    noise[2] -= 1
    assert shares_of_best(noise, seed=0).tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("shift", [0.0, 0.01, 0.02])
def test_the_error_of_a_share_is_the_slope_of_the_normal_distribution(shift):
    """With the share Phi(z) of a difference whose z has the error 1 over draws of the examples, it is phi(z)."""
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(2, 400, dtype=F64, generator=generator)
    losses[0] -= shift
    difference = losses[0] - losses[1]
    z = float(difference.mean() / (difference.std(correction=0) / math.sqrt(400)))
    errors = errors_of_shares(losses, seed=1)
    assert float(errors[0]) == pytest.approx(math.exp(-z * z / 2) / math.sqrt(2 * math.pi), rel=0.1)
    assert float(errors[1]) == pytest.approx(float(errors[0]), rel=1e-9)
    signals = compare(["a", "b"], losses, seed=1)
    assert [signal.weight_error for signal in signals.values()] == errors.tolist()


def test_the_error_of_a_share_is_its_scatter_over_draws_of_the_examples():
    """Without a difference z is normal: phi(z)^2 has the mean 1 / (2 pi sqrt 3) = .0919, and Phi(z) the variance 1/12 = .0833."""
    generator = torch.Generator().manual_seed(0)
    draws = [torch.rand(2, 60, dtype=F64, generator=generator) for _ in range(300)]
    shares = torch.stack([shares_of_best(losses, seed=k) for k, losses in enumerate(draws)])[:, 0]
    squares = torch.stack([errors_of_shares(losses, seed=k) for k, losses in enumerate(draws)])[:, 0].square()
    assert float(squares.mean()) == pytest.approx(1 / (2 * math.pi * math.sqrt(3)), rel=0.12)
    assert float(shares.var()) == pytest.approx(1 / 12, rel=0.12)


def test_shares_that_no_draw_of_the_examples_moves_have_no_error():
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(1, 200, dtype=F64, generator=generator).repeat(3, 1)
    losses[2] += 1
    assert errors_of_shares(losses, seed=0).tolist() == [0, 0, 0]


@pytest.mark.parametrize("count", [3, 7, 15])
def test_candidates_of_one_loss_share_the_resamples_in_which_they_are_best(count):
    """The rounding of a product of matrices may differ from row to row."""
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(1, 200, dtype=F64, generator=generator).repeat(count, 1)
    losses[1] += 1
    shares = shares_of_best(losses, seed=0).tolist()
    assert shares == pytest.approx([0 if k == 1 else 1 / (count - 1) for k in range(count)])


def test_the_signal_is_the_paired_difference_from_the_mean_and_its_error():
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(3, 200, dtype=F64, generator=generator) + torch.rand(200, dtype=F64, generator=generator) * 10
    losses[1] -= 0.3
    signals = compare(["a", "b", "c"], losses, seed=0)
    differences = losses.mean(0) - losses
    for k, name in enumerate("abc"):
        assert signals[name].mean == pytest.approx(float(differences[k].mean()), rel=1e-12)
        # 2,000 resamples know a standard deviation to 1.6%.
        error = float(differences[k].std(correction=0)) / math.sqrt(200)
        assert signals[name].error == pytest.approx(error, rel=0.08)
    # The large spread that the candidates share does not hide the difference.
    assert [name for name in "abc" if signals[name].significant and signals[name].mean > 0] == ["b"]


def test_candidates_that_never_differ_are_not_significant():
    losses = torch.rand(1, 50, dtype=F64).expand(3, 50)
    assert not any(signal.significant or signal.z for signal in compare(["a", "b", "c"], losses, seed=0).values())


@pytest.mark.parametrize("times", [1, 4], ids=["once", "four times"])
def test_at_most_five_percent_of_runs_without_a_difference_have_a_significant_candidate(times: int):
    """Features of seven random networks; labels that belong to none of the examples, each listed once or four times."""
    generator = torch.Generator().manual_seed(0)
    wrong, runs = 0, 300
    groups = torch.arange(120).repeat(times)
    for _ in range(runs):
        inputs = torch.randn(120, 6, dtype=F64, generator=generator)
        labels = (torch.randn(120, 1, dtype=F64, generator=generator) ** 3).repeat(times, 1)  # heavy tails
        losses = []
        for _ in range(7):
            features = (inputs @ torch.randn(6, 16, dtype=F64, generator=generator)).tanh()
            losses.append(ridge_leave_one_out(features.repeat(times, 1), labels, groups).losses)
        signals = compare([str(k) for k in range(7)], torch.stack(losses), seed=0)
        wrong += any(signal.significant for signal in signals.values())
    # 5% of 300 is 15; with the standard error of 3.8, up to 22 are within two of it.
    assert wrong <= 22


def test_two_measurements_are_judged_by_the_exact_quantile_of_student() -> None:
    """With one degree of freedom, Student's t is Cauchy's distribution: its 97.5% quantile is tan(0.475 pi) = 12.706."""
    quantile = math.tan(0.475 * math.pi)
    for factor, significant in ((0.99, False), (1.01, True)):
        scatter = 1 / (factor * quantile)
        means = [torch.tensor([1 + scatter]), torch.tensor([1 - scatter])]
        halves = [(torch.zeros(1), torch.zeros(1))] * 2
        signal = judge(["a"], [mean.double() for mean in means], halves)["a"]
        assert signal.z == pytest.approx(factor * quantile, rel=1e-5)
        assert signal.significant is significant
