"""Kinds of products against one another, on layers that are known to trouble one kind or another."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from core_cases import distance, gradient_of
from functions import OnceDifferentiable
from torch import Tensor, nn
from torch.nn.functional import dropout

import mlopt
from mlopt.testing import logistic_regression


class Transposed(nn.Module):
    """Drops out of a tensor that is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return dropout(self.layer(x).tanh().T, 0.5).T


class Mapped(nn.Module):
    """A layer that is mapped over its samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(self.layer)(x).tanh()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x[:, None, :].expand(-1, 2, -1))[0][:, -1]
        return out


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
    "layer_norm": lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)),
    "batch_norm": lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)),
    "batch_norm_first": lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)),
    "group_norm": lambda: nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.Tanh(), nn.Linear(6, 3)),
    "dropout": lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)),
    "glu": lambda: nn.Sequential(nn.Linear(4, 6), nn.GLU()),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True),
    "vmap": Mapped,
    "lstm": Recurrent,
}


def problem_of(network: nn.Module, estimator: mlopt.Estimator) -> mlopt.Problem:
    """Return scales of the inputs' features over a network."""
    torch.manual_seed(1)
    inputs, targets = torch.randn(9, 4), torch.randn(9)

    def inner(module: nn.Module, batch: Any, *, scales: nn.Module) -> Tensor:
        decay = torch.stack([p.square().sum() for p in module.parameters()]).sum()
        return (module(inputs * scales())[:, 0] - targets).square().mean() + 0.1 * decay

    def outer(module: nn.Module, batch: Any, *, network: nn.Module) -> Tensor:
        return (network(inputs)[:, 0] - targets).square().mean()

    return mlopt.Problem(
        mlopt.Level("scales", mlopt.variables(torch.rand(4) + 0.5), outer),
        mlopt.Level("network", network, inner, estimator=estimator),
    )


@pytest.mark.parametrize("solver", ["identity", "neumann"])
@pytest.mark.parametrize("name", NETWORKS)
def test_kinds_of_products_agree(name: str, solver: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]()
    gradients = {}
    for products in ("autograd", "forward", "finite_difference"):
        rules = {
            "identity": mlopt.Identity(products=products),
            "neumann": mlopt.Neumann(iterations=3, step_size=0.05, products=products),
        }
        gradients[products] = gradient_of(problem_of(network, rules[solver]), seed=0)
    assert distance(gradients["forward"], gradients["autograd"]) < 1e-9
    assert distance(gradients["finite_difference"], gradients["autograd"]) < 1e-5


@pytest.mark.parametrize("rule", [mlopt.Identity, mlopt.ConjugateGradient])
def test_masks_that_torch_func_draws_in_another_order_are_refused(rule: Callable[..., mlopt.Estimator]) -> None:
    torch.manual_seed(0)
    network = Transposed()
    exact, differences = (
        gradient_of(problem_of(network, rule(products=p)), seed=0) for p in ("autograd", "finite_difference")
    )
    assert distance(differences, exact) < 1e-5
    with pytest.raises(
        mlopt.EstimatorError, match=r"level 'network': its loss is .* under torch.func .* draws other random numbers"
    ):
        mlopt.hypergradient(problem_of(network, rule(products="forward")), seed=0)


class Squared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = OnceDifferentiable.apply(self.layer(x))
        return out


@pytest.mark.parametrize("products", ["autograd", "forward"])
def test_a_function_that_is_differentiable_once_is_refused(products: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(mlopt.SecondDerivativeError, match="once_differentiable"):
        mlopt.hypergradient(problem_of(Squared(), mlopt.ConjugateGradient(products=products)), seed=0)


def test_forward_products_have_the_dtype_of_the_variables() -> None:
    """The tangent of a Python number times a scalar of float32 is a scalar of float64 in torch's forward mode."""

    def inner(y: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
        value: Tensor = 0.01 * y().square().sum() * x().exp().sum()
        return value

    rule = mlopt.ConjugateGradient(products="forward")
    problem = mlopt.Problem(
        mlopt.Level("x", mlopt.variables(torch.ones(2).float()), lambda x, batch, *, y: y().sum()),
        mlopt.Level("y", mlopt.variables(torch.ones(3).float()), inner, estimator=rule),
    )
    assert mlopt.hypergradient(problem).gradient["value"].dtype == torch.float32


def test_forward_products_in_several_threads() -> None:
    """Torch has one level of forward mode in a process; products of different problems wait for each other."""
    errors: list[float] = []

    def work(seed: int) -> None:
        for _ in range(10):
            case = logistic_regression(mlopt.ConjugateGradient(iterations=10, products="forward"), seed=seed)
            errors.append(case.error(mlopt.hypergradient(case.problem).gradient))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 40
    assert max(errors) < 1e-8
