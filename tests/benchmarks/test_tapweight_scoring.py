"""The frozen probe of the study, held against scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from study_cases import plan

from benchmarks.tapweight.molecules import MoleculeStudy
from benchmarks.tapweight.scoring import plain, probe
from mlopt.recipes.tapweight.exact_head import ridge_leave_one_out


def reference(features: torch.Tensor, labels: np.ndarray, test: torch.Tensor) -> np.ndarray:
    """Return the predictions of ridge regression with the penalty of least leave-one-out loss, clipped."""
    penalty = ridge_leave_one_out(
        features, torch.from_numpy((labels - labels[:16].mean()) / labels[:16].std())[:, None]
    ).penalty
    scaler = StandardScaler().fit(features.numpy())
    ridge = Ridge(alpha=penalty * len(labels)).fit(scaler.transform(features.numpy()), labels)
    return ridge.predict(scaler.transform(test.numpy())).clip(labels.min(), labels.max())


@pytest.mark.parametrize("name", ["esol", "bbbp"])
def test_the_probe_and_the_plain_features_are_scored_by_ridge_regression(tmp_path: Path, name: str) -> None:
    study = MoleculeStudy(plan(tmp_path))
    task = study.task(name, 0, 20)
    encoder = study.recipe("corpus", task, 0).experiment(1, progress=False).encoder.eval()
    graphs = [*task.splits["train"], *task.splits["valid"], *task.splits["test"]]
    with torch.no_grad():
        features = encoder.pool(task.collate(graphs)).double()
    labels = torch.cat([graph.y for graph in graphs]).squeeze(1).double().numpy()
    for own, (labelled, test) in (
        (probe(encoder, task), (features[:20], features[20:])),
        (plain(encoder, task, *study.plain_features(task)), study.plain_features(task)),
    ):
        predictions = reference(labelled, labels[:20], test)
        error = np.sqrt(((predictions - labels[20:]) ** 2).mean())
        expected = error if name == "esol" else roc_auc_score(labels[20:], predictions)
        assert own == pytest.approx(expected, rel=1e-5)
