"""Metrics equal those of scikit-learn and scipy."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as reference

from mlopt.recipes.tapweight.metrics import METRICS, MetricName, measures_of


def close(values: dict[str, float], expected: dict[str, float]) -> None:
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("seed", range(3))
def test_two_classes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(50, generator=generator) > 0.7).double()
    outputs = (torch.randn(50, generator=generator, dtype=torch.float64) * 40).round() + labels
    y, o = labels.numpy(), outputs.numpy()
    close(
        measures_of("binary", outputs, labels),
        {
            "roc_auc": reference.roc_auc_score(y, o),
            "pr_auc": reference.average_precision_score(y, o),
            "accuracy": reference.accuracy_score(y, o > 0),
            "f1": reference.f1_score(y, o > 0),
            "matthews": reference.matthews_corrcoef(y, o > 0),
        },
    )


@pytest.mark.parametrize("count", [2, 4])
def test_classes(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    labels = torch.randint(count, (60,), generator=generator)
    outputs = torch.randn(60, count, generator=generator, dtype=torch.float64)
    outputs[torch.arange(60), labels] += 0.7
    y, predicted, shares = labels.numpy(), outputs.argmax(1).numpy(), outputs.softmax(1).numpy()
    scores, average = (shares[:, 1], "binary") if count == 2 else (shares, "macro")
    one_hot = y if count == 2 else np.eye(count)[y]
    close(
        measures_of("classes", outputs, labels),
        {
            "accuracy": reference.accuracy_score(y, predicted),
            "macro_f1": reference.f1_score(y, predicted, average="macro"),
            "micro_f1": reference.f1_score(y, predicted, average="micro"),
            "f1": reference.f1_score(y, predicted, average=average),
            "matthews": reference.matthews_corrcoef(y, predicted),
            "roc_auc": reference.roc_auc_score(y, scores, multi_class="ovr"),
            "pr_auc": reference.average_precision_score(one_hot, scores),
        },
    )


def test_several_classes_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(40, 3, generator=generator) > 0.6).float()
    outputs = torch.randn(40, 3, generator=generator, dtype=torch.float64) + labels
    y, o = labels.numpy(), outputs.numpy()
    close(
        measures_of("several", outputs, labels),
        {
            "micro_f1": reference.f1_score(y, o > 0, average="micro"),
            "macro_f1": reference.f1_score(y, o > 0, average="macro"),
            "accuracy": float(np.mean((o > 0) == y)),
            "roc_auc": reference.roc_auc_score(y, o),
            "pr_auc": reference.average_precision_score(y, o),
        },
    )


def test_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randn(40, generator=generator, dtype=torch.float64) * 3 + 5
    outputs = labels + torch.randn(40, generator=generator, dtype=torch.float64)
    y, o = labels.numpy(), outputs.numpy()
    close(
        measures_of("numbers", outputs, labels),
        {
            "rmse": reference.root_mean_squared_error(y, o),
            "mae": reference.mean_absolute_error(y, o),
            "r2": reference.r2_score(y, o),
            "pearson": stats.pearsonr(y, o).statistic,
            "spearman": stats.spearmanr(y, o).statistic,
        },
    )


def test_what_is_undefined_is_left_out() -> None:
    assert measures_of("binary", torch.randn(4), torch.ones(4)).keys() == {"accuracy", "f1", "matthews"}
    assert measures_of("several", torch.randn(2, 2), torch.ones(2, 2)).keys() == {"micro_f1", "macro_f1", "accuracy"}
    assert measures_of("numbers", torch.randn(3), torch.ones(3))["pearson"] == 0.0


def test_every_name_is_an_option() -> None:
    assert {name for measures in METRICS.values() for name in measures} == set(get_args(MetricName))
