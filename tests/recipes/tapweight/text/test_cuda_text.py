"""TapWeight for text on a GPU, with a tiny BERT of random weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cuda_cases import CPU, DEVICE, needs_cuda
from text_cases import encoder, tapweight

import mlopt

pytestmark = needs_cuda


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("estimator", [mlopt.Identity(), mlopt.ConjugateGradient(iterations=2, damping=1.0)], ids=str)
def test_weights_and_scores_are_those_of_the_cpu(masked: bool, estimator: mlopt.Estimator) -> None:
    """Without dropout; the objectives draw their masks on the CPU."""
    results = []
    for device in (DEVICE, CPU):
        own = encoder("bert", masked=masked, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).to(device)
        made = tapweight(own, estimator=estimator)
        made.task.dropout = 0.0
        results.append(made.fit(4, methods=["equal", "tapweight"], progress=False))
    there, here = results
    assert next(there.encoder.parameters()).device.type == DEVICE.type
    assert there.weights == pytest.approx(here.weights, rel=1e-5)
    assert there.scores["tapweight"] == pytest.approx(here.scores["tapweight"], rel=1e-5)
    for own, other in zip(there.encoder.parameters(), here.encoder.parameters(), strict=True):
        torch.testing.assert_close(own.cpu(), other, rtol=1e-4, atol=1e-6)
    assert len(set(here.weights.values())) == 5  # the weights have moved
