"""Law 6: a level may have frozen, unused and tied parameters; two levels must not train one tensor."""

from __future__ import annotations

import pytest
import torch
from core_cases import PRODUCTS, distance, drawn, seeds
from hypothesis import given
from torch import Tensor, nn

import mlopt

TOLERANCE = {"autograd": 1e-9, "forward": 1e-9, "finite_difference": 1e-6}


class Plain(nn.Module):
    """A module with two trainable blocks."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(3, 2, generator=generator) / 2)
        self.offset = nn.Parameter(torch.randn(2, generator=generator) / 2)
        self.scale: Tensor = torch.tensor([1.0, 2.0, 0.5])

    def forward(self, inputs: Tensor) -> Tensor:
        """Encode, scale, decode by the same matrix."""
        return torch.tanh(self.scale * (inputs @ self.matrix.T)) @ self.matrix + self.offset


class Decorated(nn.Module):
    """The same function of the same variables, with a tied decoder, a frozen scale and unused parameters."""

    def __init__(self, plain: Plain) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(4))
        self.encoder, self.decoder = nn.Linear(2, 3, bias=False), nn.Linear(3, 2)
        self.encoder.weight = nn.Parameter(plain.matrix.detach().clone())
        # Tied as in a language model's embedding and output layer; forward uses the weight transposed.
        self.decoder.register_parameter("weight", self.encoder.weight)
        self.decoder.bias = nn.Parameter(plain.offset.detach().clone())
        self.scale = nn.Parameter(plain.scale.clone(), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.scale * self.encoder(inputs))
        return hidden @ self.decoder.weight + self.decoder.bias


def build(network: nn.Module, estimator: mlopt.Estimator, seed: int) -> mlopt.Problem:
    generator = torch.Generator().manual_seed(seed)
    inputs, other = torch.randn(6, 2, generator=generator), torch.randn(6, 2, generator=generator)
    weights = mlopt.variables(torch.randn(6, generator=generator))

    def inner(module: nn.Module, batch: None, *, weights: nn.Module) -> Tensor:
        return (weights().sigmoid() * (module(inputs) - other).square().sum(1)).mean()

    def outer(module: nn.Module, batch: None, *, network: nn.Module) -> Tensor:
        return (network(other) - inputs).square().mean()

    return mlopt.Problem(
        mlopt.Level("weights", weights, outer), mlopt.Level("network", network, inner, estimator=estimator)
    )


@pytest.mark.parametrize("products", PRODUCTS)
@drawn(8)
@given(seed=seeds)
def test_a_decorated_module_has_the_hypergradient_of_the_plain_one(products: str, seed: int) -> None:
    plain = Plain(torch.Generator().manual_seed(seed))
    decorated = Decorated(plain)
    oracle = mlopt.hypergradient(build(plain, mlopt.Dense(damping=10.0), seed)).gradient["value"]
    # Damped: an unused parameter makes the Hessian singular, and a drawn network may have negative curvature.
    for estimator in (
        mlopt.Dense(damping=10.0, products=products),
        mlopt.ConjugateGradient(iterations=30, damping=10.0, rtol=1e-11, products=products),
    ):
        gradient = mlopt.hypergradient(build(decorated, estimator, seed)).gradient["value"]
        assert distance(gradient, oracle) < TOLERANCE[products]


def test_conjugate_gradients_need_no_damping_for_unused_parameters() -> None:
    def inner(module: Decorated, batch: None, *, x: nn.Module) -> Tensor:
        return (module.decoder.bias - x()).square().sum() + module.encoder.weight.square().sum()

    def outer(module: nn.Module, batch: None, *, y: Decorated) -> Tensor:
        return (module() * y.decoder.bias).sum()

    network = Decorated(Plain(torch.Generator().manual_seed(0)))
    y = mlopt.Level("y", network, inner, estimator=mlopt.ConjugateGradient())
    result = mlopt.hypergradient(mlopt.Problem(mlopt.Level("x", mlopt.variables(torch.ones(2)), outer), y))
    expected = network.decoder.bias.detach() + 1.0
    assert distance(result.gradient["value"], expected) < 1e-12
    assert result.reports["y"].converged is True


def test_dense_with_an_unused_parameter() -> None:
    """The Hessian has zero rows and columns; the least-norm solution is the one for the used parameters."""
    plain = Plain(torch.Generator().manual_seed(1))
    problem = build(Decorated(plain), mlopt.Dense(), 1)
    oracle = mlopt.hypergradient(build(plain, mlopt.Dense(), 1)).gradient["value"]
    assert distance(mlopt.hypergradient(problem).gradient["value"], oracle) < 1e-8


def test_tied_parameters_are_one_variable() -> None:
    level = build(Decorated(Plain(torch.Generator())), mlopt.Dense(damping=1.0), 0)["network"]
    assert level.parameter_names == ("unused", "encoder.weight", "decoder.bias")
    assert [p.shape for p in level.parameters] == [(4,), (3, 2), (2,)]


@pytest.mark.parametrize("products", PRODUCTS)
def test_the_outermost_level_may_have_frozen_unused_and_tied_parameters(products: str) -> None:
    plain = Plain(torch.Generator().manual_seed(2))
    decorated = Decorated(plain)

    def gradient(module: nn.Module) -> dict[str, Tensor]:
        def outer(module: nn.Module, batch: None, *, y: nn.Module) -> Tensor:
            return (module(torch.ones(1, 2)) * y()).sum()

        def inner(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
            return (module() - x(torch.ones(1, 2)).sum()).square().sum() + module().sum()

        y = mlopt.Level("y", mlopt.variables(torch.ones(2)), inner, estimator=mlopt.Dense(products=products))
        return mlopt.hypergradient(mlopt.Problem(mlopt.Level("x", module, outer), y)).gradient

    gradients, expected = gradient(decorated), gradient(plain)
    assert set(gradients) == {"unused", "encoder.weight", "decoder.bias"}
    assert not gradients["unused"].any()
    assert distance(gradients["encoder.weight"], expected["matrix"]) < TOLERANCE[products]
    assert distance(gradients["decoder.bias"], expected["offset"]) < TOLERANCE[products]


def test_one_tensor_trained_by_two_levels_is_refused() -> None:
    plain = Plain(torch.Generator())
    thief = nn.Module()
    thief.stolen = plain.offset

    def loss(module: nn.Module, batch: None, *, b: nn.Module) -> Tensor:
        return module(torch.ones(1, 2)).sum()

    def other(module: nn.Module, batch: None, *, a: nn.Module) -> Tensor:
        return module.stolen.sum()

    def levels() -> list[mlopt.Level]:
        return [mlopt.Level("a", plain, loss), mlopt.Level("b", thief, other, estimator=mlopt.Identity())]

    with pytest.raises(
        mlopt.ProblemError, match=r"'a' and 'b' train the same tensor \(a\.offset is b\.stolen\); give +one"
    ):
        mlopt.Problem(*levels())
    plain.offset.requires_grad_(False)
    thief.extra = nn.Parameter(torch.ones(1))
    assert mlopt.Problem(*levels())["b"].parameter_names == ("extra",)


@pytest.mark.parametrize("products", PRODUCTS)
def test_a_frozen_backbone_may_be_shared(products: str) -> None:
    """Two levels hold one frozen module; each trains a head of its own."""
    backbone = nn.Linear(2, 3).requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        heads = [nn.Linear(3, 1) for _ in range(2)]
    networks = [nn.Sequential(backbone, head) for head in heads]

    def gradient(a: nn.Module, b: nn.Module, view: nn.Module) -> Tensor:
        inputs = torch.arange(8.0).reshape(4, 2) / 8

        def outer(module: nn.Module, batch: None, *, b: nn.Module) -> Tensor:
            return (module(view(inputs)) - b(view(inputs))).square().sum()

        def inner(module: nn.Module, batch: None, *, a: nn.Module) -> Tensor:
            ridge = sum(p.square().sum() for p in module.parameters() if p.requires_grad)
            return (module(view(inputs)) * a(view(inputs)) - 1).square().sum() + ridge

        level = mlopt.Level("b", b, inner, estimator=mlopt.Dense(products=products))
        return torch.cat(
            [
                g.reshape(-1)
                for g in mlopt.hypergradient(mlopt.Problem(mlopt.Level("a", a, outer), level)).gradient.values()
            ]
        )

    shared, apart = gradient(*networks, nn.Identity()), gradient(*heads, backbone)
    assert distance(shared, apart) < TOLERANCE[products]
