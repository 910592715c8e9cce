"""The levels of TapWeight find the weights that are known in closed form, inside the simplex and not only at its corners."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tapweight_cases import F64
from torch import Tensor, nn
from torch.optim import SGD, Adam

import mlopt
from mlopt.recipes.tapweight.methods.weights import SimplexWeights

_SEEDS = 20
_GAMMA = 2.0


class Vector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(4, dtype=F64))


def learned(seed: int, response: mlopt.RealSteps | None) -> tuple[Tensor, Tensor]:
    """Return the learned weights and the best ones.

    With L_k = ||theta - c_k||^2 / 2 the pretrained theta is sum_k lambda_k c_k, and with L_train = ||omega - t||^2 / 2 the
    finetuned omega is (t + 2 gamma theta) / (1 + 2 gamma). The validation loss is the distance to the omega of the best weights.
    """
    draws = torch.Generator().manual_seed(seed)
    centres, labels = torch.randn(3, 4, dtype=F64, generator=draws), torch.randn(4, dtype=F64, generator=draws)
    best = torch.rand(3, dtype=F64, generator=draws) + 0.3
    best /= best.sum()
    target = (labels + 2 * _GAMMA * best @ centres) / (1 + 2 * _GAMMA)

    def pretraining_loss(own: Vector, batch: Any, *, reweighting: nn.Module) -> mlopt.Mixture:
        return mlopt.Mixture([(own.value - centre).square().sum() / 2 for centre in centres], weights="reweighting")

    def finetuning_loss(own: Vector, batch: Any) -> Tensor:
        return (own.value - labels).square().sum() / 2

    def coupling(own: Vector, *, pretraining: Vector) -> Tensor:
        return _GAMMA * (own.value - pretraining.value).square().sum()

    def validation_loss(own: nn.Module, batch: Any, *, finetuning: Vector) -> Tensor:
        return (finetuning.value - target).square().sum()

    weights = SimplexWeights(3).double()
    inside: dict[str, Any] = {} if response else {"estimator": mlopt.ConjugateGradient(iterations=4)}
    problem = mlopt.Problem(
        mlopt.Level("reweighting", weights, validation_loss, optimizer=partial(Adam, lr=0.2), response=response),
        # At these learning rates one step ends at the solution.
        mlopt.Level(
            "finetuning",
            Vector(),
            finetuning_loss,
            regularizer=coupling,
            optimizer=partial(SGD, lr=1 / (1 + 2 * _GAMMA)),
            **inside,
        ),
        mlopt.Level("pretraining", Vector(), pretraining_loss, optimizer=partial(SGD, lr=1.0), **inside),
    )
    mlopt.solve(problem, 80, progress=False)
    return weights().detach(), best


@pytest.mark.parametrize("response", [None, mlopt.RealSteps(steps=1)], ids=["gradient", "real steps"])
def test_the_weights_are_within_five_percent_of_the_best_in_every_seed(response: mlopt.RealSteps | None) -> None:
    for seed in range(_SEEDS):
        ours, best = learned(seed, response)
        assert float(((ours - best) / best).abs().max()) < 0.05, (seed, ours, best)
        assert 0.1 < float(best.min()) < float(best.max()) < 0.8
