"""Problems with compiled products and with live ones, and comparisons of the two."""

from __future__ import annotations

from typing import Any

import torch
from core_cases import distance, gradient_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mlopt

INPUTS, LABELS = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).double(), torch.arange(7) % 2
BATCHES = [(INPUTS, LABELS), (2 * INPUTS, LABELS), (INPUTS[:4], LABELS[:4])]
SOLVER = mlopt.linear.ConjugateGradient(iterations=4, damping=1.0, negative_curvature="continue")


def loss_of(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
    inputs, labels = batch
    return (weights()[: len(labels)] * cross_entropy(module(inputs), labels, reduction="none")).mean()


def decay(module: nn.Module) -> Tensor:
    return torch.stack([p.square().sum() for p in module.parameters()]).sum()


def problem_of(
    network: nn.Module, loss: Any = loss_of, data: Any = BATCHES, regularizer: Any = None, **options: Any
) -> mlopt.Problem:
    """Return weights of samples over a network."""

    def validation(weights: nn.Module, batch: Any, *, network: nn.Module) -> Tensor:
        return torch.stack([p.sin().sum() for p in network.parameters()]).sum()

    rule = mlopt.LinearSolve(solver=SOLVER, **options)
    weights = mlopt.variables(torch.linspace(0.1, 1.0, 7))
    return mlopt.Problem(
        mlopt.Level("weights", weights, validation),
        mlopt.Level("network", network, loss, data=data, estimator=rule, regularizer=regularizer),
    )


def pair(network: nn.Module, loss: Any = loss_of, **options: Any) -> tuple[mlopt.Problem, mlopt.Problem]:
    """Return the problem with compiled products, and with live ones."""
    return problem_of(network, loss, compile=True, **options), problem_of(network, loss, **options)


def compare(compiled: mlopt.Problem, live: mlopt.Problem, batches: Any = BATCHES, seeds: int = 4) -> None:
    """Compare hypergradients on batches; most products are not compared by the library itself."""
    for seed in range(seeds):
        for batch in batches:
            gradient = gradient_of(compiled, batches={"network": batch}, seed=seed)
            assert distance(gradient, gradient_of(live, batches={"network": batch}, seed=seed)) < 1e-12
