"""The ridge head: its leave-one-out error equals that of refitting without each example."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from tapweight_cases import F64, recipe
from torch import Tensor

from mlopt.recipes.tapweight.exact_head import feature_passes, labelled_features, ridge_fit, ridge_leave_one_out


def problem(seed: int, count: int, width: int, columns: int, missing: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, width, dtype=F64, generator=generator) * 3 + 1
    targets = features @ torch.randn(width, columns, dtype=F64, generator=generator)
    targets += 2 * torch.randn(count, columns, dtype=F64, generator=generator)
    gone = torch.rand(count, columns, generator=generator) < missing
    gone[:4] = False
    return features, targets.masked_fill(gone, torch.nan)


def refitted(features: Tensor, targets: Tensor, penalty: float, groups: Tensor | None = None) -> Tensor:
    """Return held-out predictions by scikit-learn, one fit for each row and column, without the rows of the same example."""
    groups = torch.arange(len(features)) if groups is None else groups
    predictions = torch.zeros_like(targets)
    for column in range(targets.shape[1]):
        rows = (~targets[:, column].isnan()).nonzero().squeeze(1)
        own, labels = features[rows].numpy(), targets[rows, column].numpy()
        own = (own - own.mean(0)) / (own.std(0) + 1e-6)
        for k, row in enumerate(rows.tolist()):
            others = (groups[rows] != groups[row]).numpy()
            ridge = Ridge(alpha=penalty * len(rows), solver="svd").fit(own[others], labels[others])
            value = ridge.predict(own[k : k + 1])[0]
            predictions[row, column] = float(np.clip(value, labels.min(), labels.max()))
    return predictions


@settings(deadline=None)  # the first fit imports
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(6, 25),
    width=st.integers(1, 30),
    columns=st.integers(1, 3),
    missing=st.sampled_from([0.0, 0.3]),
)
def test_the_held_out_predictions_are_those_of_fits_without_the_example(seed, count, width, columns, missing):
    features, targets = problem(seed, count, width, columns, missing)
    ours = ridge_leave_one_out(features, targets)
    expected = refitted(features, targets, ours.penalty)
    # The smallest penalty, 1e-4 n, multiplies the rounding of a solve by its inverse.
    torch.testing.assert_close(ours.predictions, expected, rtol=1e-7, atol=1e-7)
    present = ~targets.isnan()
    errors = torch.where(present, targets - expected, 0).square().sum(1) / present.sum(1).clamp(min=1)
    torch.testing.assert_close(ours.losses, errors, rtol=1e-6, atol=1e-6)


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    groups=st.lists(st.integers(0, 8), min_size=6, max_size=25).filter(lambda groups: len(set(groups[:4])) > 1),
    width=st.integers(1, 30),
    columns=st.integers(1, 3),
    missing=st.sampled_from([0.0, 0.3]),
)
def test_the_rows_of_one_example_are_held_out_together(seed, groups, width, columns, missing):
    features, targets = problem(seed, len(groups), width, columns, missing)
    numbers = torch.tensor([list(dict.fromkeys(groups)).index(group) for group in groups])
    ours = ridge_leave_one_out(features, targets, numbers)
    expected = refitted(features, targets, ours.penalty, numbers)
    torch.testing.assert_close(ours.predictions, expected, rtol=1e-7, atol=1e-7)
    squares = torch.where(targets.isnan(), 0, targets - expected).square()
    for number, loss in enumerate(ours.losses):
        rows = numbers == number
        mean = squares[rows].sum() / (~targets[rows].isnan()).sum().clamp(min=1)
        torch.testing.assert_close(loss, mean, rtol=1e-6, atol=1e-6)


def test_numbers_of_rows_that_all_differ_change_nothing():
    features, targets = problem(0, 20, 12, 2, 0.3)
    plain, numbered = ridge_leave_one_out(features, targets), ridge_leave_one_out(features, targets, torch.arange(20))
    assert torch.equal(plain.losses, numbered.losses)
    assert torch.equal(plain.predictions, numbered.predictions)


def test_without_a_second_example_there_is_no_loss():
    features, targets = problem(0, 5, 2, 1, 0.0)
    assert ridge_leave_one_out(features, targets, torch.zeros(5, dtype=torch.int64)).losses.tolist() == [0.0]


@settings(deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_penalty_has_the_smallest_held_out_loss(seed):
    features, targets = problem(seed, 20, 12, 1, 0.0)
    ours = ridge_leave_one_out(features, targets)
    for factor in (0.1, 10.0):
        if 1e-4 <= ours.penalty * factor <= 1e3:
            other = (refitted(features, targets, ours.penalty * factor) - targets).square().mean()
            assert ours.losses.mean() <= other + 1e-9


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), missing=st.sampled_from([0.0, 0.3]))
def test_the_fit_predicts_as_scikit_learn_does_within_the_range_of_the_labels(seed, missing):
    features, targets = problem(seed, 20, 5, 2, missing)
    new = problem(seed + 1, 9, 5, 2, 0.0)[0]
    ours = ridge_fit(features, targets, 0.01)(new)
    for column in range(2):
        rows = ~targets[:, column].isnan()
        own, labels = features[rows].numpy(), targets[rows, column].numpy()
        mean, deviation = own.mean(0), own.std(0) + 1e-6
        ridge = Ridge(alpha=0.01 * len(own), solver="svd").fit((own - mean) / deviation, labels)
        expected = ridge.predict((new.numpy() - mean) / deviation).clip(labels.min(), labels.max())
        np.testing.assert_allclose(ours[:, column].numpy(), expected, rtol=1e-8, atol=1e-8)


def test_constant_features_predict_the_mean_of_the_others():
    targets = torch.tensor([[0.0], [1.0], [2.0], [5.0]], dtype=F64)
    ours = ridge_leave_one_out(torch.ones(4, 3, dtype=F64), targets)
    torch.testing.assert_close(ours.predictions, (8 - targets) / 3, rtol=1e-12, atol=0)


def test_examples_without_labels_and_single_labels_have_no_loss():
    features, targets = problem(0, 8, 2, 2, 0.0)
    targets[3] = torch.nan
    targets[1:, 1] = torch.nan
    losses = ridge_leave_one_out(features, targets).losses
    assert losses[3] == 0
    assert bool(losses.isfinite().all())
    assert losses[0] > 0


def test_features_are_taken_in_eval_mode_in_the_order_of_the_splits():
    experiment = recipe().experiment(3)
    encoder, task = experiment.encoder, experiment.task
    encoder.train()
    features, targets = labelled_features(encoder, task, ("train", "valid"))
    examples = torch.stack([*task.splits["train"], *task.splits["valid"]])
    torch.testing.assert_close(features, encoder(examples).detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(targets, examples.sum(1, keepdim=True), rtol=0, atol=0)
    assert encoder.training
    assert feature_passes(task, ("train", "valid")) == 2


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_cost_of_features_counts_batches_of_256(split):
    task = recipe().task
    task.splits = {split: [torch.zeros(3)] * 257}
    assert feature_passes(task, (split,)) == 2


def test_a_column_without_labels_is_predicted_as_zero():
    features, targets = problem(0, 20, 3, 2, 0.0)
    targets[:, 1] = torch.nan
    predictions = ridge_fit(features, targets, 1e-2)(features)
    assert torch.equal(predictions[:, 0], ridge_fit(features, targets[:, :1], 1e-2)(features).squeeze(1))
    assert not predictions[:, 1].any()
