"""A level whose module recomputes activations (torch.utils.checkpoint) has the hypergradient of one that keeps them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import mlopt

CG = partial(mlopt.ConjugateGradient, iterations=4, rtol=0.0, damping=0.5)
ESTIMATORS: dict[str, Callable[[], mlopt.Estimator]] = {
    "identity": mlopt.Identity,
    "differences": mlopt.FiniteDifference,
    "sama": mlopt.SAMA,
    "cg": CG,
    "cg by differences": partial(CG, products="finite_difference"),
    "cg, gauss-newton": partial(CG, products="gauss_newton"),
    "minres": partial(mlopt.MINRES, iterations=4, rtol=0.0, damping=0.5),
    "gmres": partial(mlopt.GMRES, iterations=4, rtol=0.0, damping=0.5),
    "neumann": partial(mlopt.Neumann, iterations=3, step_size=0.1),
    "nystrom": partial(mlopt.Nystrom, rank=4, damping=0.5),
    "dense": partial(mlopt.Dense, damping=0.5),
    "unrolled": partial(mlopt.Unrolled, steps=3),
    "value function": partial(mlopt.ValueFunction, steps=4, step_size=0.1),
}


class Encoder(nn.Module):
    """Blocks with dropout, whose activations are kept, or computed again in the backward pass."""

    def __init__(self, *, recompute: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        parts = (nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.3)) for _ in range(2))
        self.blocks, self.head = nn.ModuleList(parts), nn.Linear(4, 2)
        self.double()
        self.recompute, self.evaluations = recompute, 0
        self.blocks[0].register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.evaluations += 1

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(x)  # type: ignore[no-any-return]


def of(estimator: mlopt.Estimator, encoder: Encoder) -> mlopt.Problem:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    labels = (inputs.sum(1) > 0).long()

    def training(encoder: nn.Module, batch: None, *, weights: nn.Module) -> Tensor:
        return (weights().sigmoid() * cross_entropy(encoder(inputs), labels, reduction="none")).mean()

    def validation(weights: nn.Module, batch: None, *, encoder: nn.Module) -> Tensor:
        return cross_entropy(encoder(inputs[:5]), labels[:5])

    weights = mlopt.variables(torch.linspace(-1, 1, 12, dtype=torch.float64))
    return mlopt.Problem(
        mlopt.Level("weights", weights, validation, optimizer=partial(SGD, lr=0.1)),
        mlopt.Level("encoder", encoder, training, optimizer=partial(SGD, lr=0.1), estimator=estimator),
    )


@pytest.mark.filterwarnings("ignore::mlopt.TrustWarning")  # few iterations do not converge
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_hypergradient_is_that_with_kept_activations(name: str) -> None:
    kept, recomputed = Encoder(recompute=False), Encoder(recompute=True)
    expected, own = (
        mlopt.hypergradient(of(ESTIMATORS[name](), encoder), seed=0).gradient["value"] for encoder in (kept, recomputed)
    )
    assert recomputed.evaluations > kept.evaluations
    assert expected.norm() > 1e-3
    assert float((own - expected).norm() / expected.norm()) < 1e-12


@pytest.mark.filterwarnings("ignore::mlopt.TrustWarning")
@pytest.mark.parametrize("name", ["differences", "cg"])
def test_a_run_ends_at_the_same_variables(name: str) -> None:
    ends = []
    for recompute in (False, True):
        encoder = Encoder(recompute=recompute)
        mlopt.solve(of(ESTIMATORS[name](), encoder), 3, seed=0, progress=False)
        ends.append(torch.cat([p.detach().reshape(-1) for p in encoder.parameters()]))
    assert float((ends[0] - ends[1]).norm() / ends[0].norm()) < 1e-12


@pytest.mark.parametrize("rule", [mlopt.Identity(products="forward"), CG(products="forward")], ids=str)
def test_forward_products_refuse_it_with_a_remedy(rule: mlopt.Estimator) -> None:
    with pytest.raises(mlopt.MloptError, match=r"checkpoint.*(autograd|finite_difference)"):
        mlopt.hypergradient(of(rule, Encoder(recompute=True)), seed=0)
