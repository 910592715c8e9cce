"""Compiled products on a GPU, replayed as CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from core_cases import distance, gradient_of
from cuda_cases import DEVICE, needs_cuda
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

import mlopt
from mlopt.estimators.products import replay as replaying
from mlopt.estimators.products.replay import Evaluate, Replay, replay

pytestmark = needs_cuda
on_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="only a GPU has graphs")


def affine(a: Tensor, b: Tensor, v: Tensor) -> Sequence[Tensor]:
    return a * v + b, (a + v).sum()


def draw(seed: int, *size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


@on_gpu
def test_points_take_turns_and_results_last() -> None:
    first, second = ([draw(2 * k, 5), draw(2 * k + 1, 5)] for k in range(2))
    vectors = [draw(10 + k, 5) for k in range(4)]
    made = replay(affine, first, vectors[:1])
    assert made is not None
    points = [(first, made.at(first)), (second, made.at(second))]
    outcomes = [(kept, v, evaluate([v])) for v in vectors for kept, evaluate in points]
    for kept, v, outcome in outcomes:
        for own, expected in zip(outcome, affine(*kept, v), strict=True):
            assert torch.equal(own, expected)


@on_gpu
@pytest.mark.parametrize("count", [1, replaying._MOST // 8 + 1])
def test_code_that_cannot_be_replayed_runs_as_it_is(count: int) -> None:
    def waits(a: Tensor, v: Tensor) -> Sequence[Tensor]:
        return (a * float(v.sum()),)

    def plain(a: Tensor, v: Tensor) -> Sequence[Tensor]:
        return (a * v,)

    a, v = torch.ones(count, dtype=torch.float64, device=DEVICE), draw(0, 1)
    assert replay(waits, [a], [v]) is None
    assert (replay(plain, [a], [v]) is None) == (count > 1)
    assert replay(plain, [a], [v.cpu()]) is None
    # The GPU works as before: some versions of torch refuse random draws after a capture that failed.
    assert torch.rand(3, device=DEVICE).max() > 0
    torch.cuda.empty_cache()
    made = replay(plain, [a], [v])
    assert count > 1 or (made is not None and torch.equal(made.at([a])([v])[0], a * v))


class Normalised(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x.tanh(), x.shape[-1:])


class Tokens(nn.Embedding):
    """Mean of the embeddings of rounded inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.abs().round().long().clamp(max=self.num_embeddings - 1)).mean(dim=1)


NETWORKS = {
    "mlp": lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)),
    "normalised": lambda: nn.Sequential(nn.Linear(4, 8), Normalised(), nn.Linear(8, 3)),
    "dropout": lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)),
    "embedding": lambda: nn.Sequential(Tokens(4, 6), nn.GELU(), nn.Linear(6, 3)),
}


def cleaning(name: str, **options: Any) -> mlopt.Problem:
    """Return weights of samples over a network, on the device."""
    torch.manual_seed(0)
    network = NETWORKS[name]().double()
    inputs, labels = draw(1, 12, 4), torch.arange(12, device=DEVICE) % 3

    def inner(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
        losses = cross_entropy(module(batch[0]), batch[1], reduction="none")
        return (weights().sigmoid() * losses).mean() + 0.1 * sum(p.square().sum() for p in module.parameters())

    def outer(weights: nn.Module, batch: Any, *, network: nn.Module) -> Tensor:
        return cross_entropy(network(batch[0]), batch[1])

    rule = mlopt.ConjugateGradient(iterations=4, damping=0.3, **options)
    weights = mlopt.variables(torch.zeros(12, dtype=torch.float64))
    sgd = partial(SGD, lr=0.1)
    return mlopt.Problem(
        mlopt.Level("weights", weights, outer, data=[(inputs.flip(0), labels.flip(0))], optimizer=sgd, device=DEVICE),
        mlopt.Level("network", network, inner, data=[(inputs, labels)], optimizer=sgd, estimator=rule, device=DEVICE),
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_replayed_products_are_the_live_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    original = Replay.at

    def at(self: Replay, kept: Sequence[Tensor]) -> Evaluate:
        used.append(self)
        return original(self, kept)

    monkeypatch.setattr(Replay, "at", at)
    compiled, live = cleaning(name, compile=True), cleaning(name)
    for seed in range(3):
        assert distance(gradient_of(compiled, seed=seed), gradient_of(live, seed=seed)) < 1e-10
    for problem in (compiled, live):
        mlopt.solve(problem, steps=5, seed=0, progress=False)
    one, other = (
        torch.cat([p.detach().reshape(-1) for p in problem["network"].parameters]) for problem in (compiled, live)
    )
    assert distance(one, other) < 1e-10
    # The Hessian's, which holds the constant of the weight decay as an expanded tensor, and the mixed product's.
    assert len(set(used)) == (2 if DEVICE.type == "cuda" else 0)
    # Where the first products differ from live ones, the code would be given up, and the rest would be live.
    assert None not in compiled.workspace.compiled.values()
