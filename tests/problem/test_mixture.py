"""Mixtures and regularizers yield the same hypergradient as the full loss, for less work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from core_cases import PRODUCTS, Calls, distance, drawn, gradient_of, point_of, seeds
from hypothesis import given
from torch import Tensor, nn

import mlopt

TASKS = 3
TOLERANCE = {"autograd": 1e-9, "forward": 1e-9, "finite_difference": 1e-5}


class Simplex(nn.Module):
    """Weights on the simplex, from logits."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(TASKS, generator=generator))

    def forward(self) -> Tensor:
        return self.logits.softmax(0)


class Heads(nn.Module):
    """A trunk with dropout, and a head for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.5))
        self.heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(TASKS))

    def task(self, k: int, hidden: Tensor) -> Tensor:
        return (self.heads[k](hidden).squeeze(1) - k).square().mean()


def apart(network: Heads, batch: Tensor, *, weights: nn.Module) -> mlopt.Mixture:
    """One network pass per task, one after the other; each draws its own mask."""
    losses = {f"task {k}": lambda k=k: network.task(k, network.trunk(batch)) for k in range(TASKS)}
    return mlopt.Mixture(losses, weights="weights")


def apart_in_full(network: Heads, batch: Tensor, *, weights: nn.Module) -> Tensor:
    w = weights()
    return sum(w[k] * network.task(k, network.trunk(batch)) for k in range(TASKS))


def together(network: Heads, batch: Tensor, *, weights: nn.Module) -> mlopt.Mixture:
    """One network pass that all tasks share, graph and mask."""
    hidden = network.trunk(batch)
    return mlopt.Mixture([network.task(k, hidden) for k in range(TASKS)], weights="weights")


def together_in_full(network: Heads, batch: Tensor, *, weights: nn.Module) -> Tensor:
    w, hidden = weights(), network.trunk(batch)
    return sum(w[k] * network.task(k, hidden) for k in range(TASKS))


def logged(network: Heads, batch: Tensor, *, weights: nn.Module) -> dict[str, Any]:
    """A mapping that holds a mixture."""
    return {"loss": together(network, batch, weights=weights), "size": len(batch)}


def functions_of_one_pass(network: Heads, batch: Tensor, *, weights: nn.Module) -> mlopt.Mixture:
    """Functions that share a trunk."""
    hidden = network.trunk(batch)
    return mlopt.Mixture([lambda k=k: network.task(k, hidden) for k in range(TASKS)], weights="weights")


def held_out(weights: nn.Module, batch: Tensor, *, network: Heads) -> Tensor:
    return network.task(0, network.trunk(batch)) + weights().square().sum()


def ridge(network: nn.Module) -> Tensor:
    return sum(p.square().sum() for p in network.parameters())


def build(
    loss: Callable[..., Any],
    estimator: mlopt.Estimator,
    seed: int,
    *,
    regularizer: Callable[..., Tensor] | None = ridge,
    weights: nn.Module | None = None,
) -> mlopt.Problem:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Heads()
    batches = [torch.randn(8, 3, generator=generator) for _ in range(2)]
    weights = weights or Simplex(generator)
    inner = mlopt.Level("network", network, loss, data=batches[1:], estimator=estimator, regularizer=regularizer)
    return mlopt.Problem(mlopt.Level("weights", weights, held_out, data=batches[:1]), inner)


def rule(products: str) -> mlopt.Implicit:
    return mlopt.ConjugateGradient(iterations=40, damping=1.0, rtol=1e-10, products=products)


@pytest.mark.parametrize(
    ("mixed", "full"),
    [(apart, apart_in_full), (together, together_in_full), (logged, together_in_full)],
    ids=["apart", "together", "logged"],
)
@pytest.mark.parametrize("products", PRODUCTS)
@drawn(3)
@given(seed=seeds)
def test_a_mixture_is_its_weighted_sum(mixed: Any, full: Any, products: str, seed: int) -> None:
    expected = gradient_of(build(full, rule("autograd"), seed))
    assert distance(gradient_of(build(mixed, rule(products), seed)), expected) < TOLERANCE[products]


@pytest.mark.parametrize("products", ["autograd", "forward", "finite_difference"])
def test_functions_may_share_a_graph(products: str) -> None:
    expected = gradient_of(build(together_in_full, rule("autograd"), 0))
    assert distance(gradient_of(build(functions_of_one_pass, rule(products), 0)), expected) < TOLERANCE[products]


@pytest.mark.parametrize("products", ["autograd", "forward"])
def test_the_mixed_product_of_a_mixture_takes_no_second_derivative(products: str) -> None:
    """A kernel without one works if the solver needs none either."""

    def distances(network: Heads, batch: Tensor, *, weights: nn.Module) -> mlopt.Mixture:
        hidden = network.trunk(batch)
        if products == "forward":
            return mlopt.Mixture([hidden.square().sum() * (k + 1) for k in range(TASKS)], weights="weights")
        return mlopt.Mixture([torch.cdist(hidden, batch.new_ones(k + 1, 6)).sum() for k in range(TASKS)], "weights")

    def in_full(network: Heads, batch: Tensor, *, weights: nn.Module) -> Tensor:
        w, mixture = weights(), distances(network, batch, weights=weights)
        return sum(w[k] * mixture.loss(k) for k in range(TASKS))

    problem = build(distances, mlopt.Identity(products=products), 1, regularizer=None)
    linearization = problem["network"].estimator.linearize(point_of(problem), "network")
    generator = torch.Generator().manual_seed(1)
    direction = tuple(torch.randn(p.shape, generator=generator) for p in problem["network"].parameters)
    product = linearization.product({"network": direction}, ["weights"])["weights"]
    plain = build(in_full, mlopt.FiniteDifference(), 1, regularizer=None)
    other = plain["network"].estimator.linearize(point_of(plain), "network")
    expected = other.product({"network": direction}, ["weights"])["weights"]
    assert distance(torch.cat([*product]), torch.cat([*expected])) < 1e-6


@pytest.mark.parametrize(
    "products",
    PRODUCTS,
)
def test_a_mixture_and_a_regularizer_of_the_same_weights(products: str) -> None:
    def shrink(network: nn.Module, *, weights: nn.Module) -> Tensor:
        return (1 + weights()[0]) * ridge(network)

    def in_full(network: Heads, batch: Tensor, *, weights: nn.Module) -> Tensor:
        return together_in_full(network, batch, weights=weights) + shrink(network, weights=weights)

    expected = gradient_of(build(in_full, rule("autograd"), 0, regularizer=None))
    assert distance(gradient_of(build(together, rule(products), 0, regularizer=shrink)), expected) < TOLERANCE[products]


class Noisy(Simplex):
    """Weights that are drawn again at each call."""

    def forward(self) -> Tensor:
        return (self.logits + torch.randn(TASKS)).softmax(0)


@pytest.mark.parametrize("products", ["autograd", "forward", "finite_difference"])
def test_random_weights_see_the_random_numbers_of_the_loss(products: str) -> None:
    def outer(weights: Simplex, batch: Tensor, *, network: Heads) -> Tensor:
        return network.task(0, network.trunk(batch)) + weights.logits.square().sum()

    def problem(loss: Callable[..., Any], estimator: mlopt.Estimator) -> mlopt.Problem:
        built = build(loss, estimator, 0, weights=Noisy(torch.Generator().manual_seed(0)))
        return mlopt.Problem(
            mlopt.Level("weights", built["weights"].module, outer, data=built["weights"].data), built["network"]
        )

    expected = gradient_of(problem(apart_in_full, rule("autograd")))
    assert distance(gradient_of(problem(apart, rule(products))), expected) < TOLERANCE[products]


def pull(network: nn.Module, *, weights: nn.Module) -> Tensor:
    """A proximal coupling: the only term that depends on the weights."""
    return sum((p.mean() - weights()[0]).square() for p in network.parameters()) * 2


def data_term(network: Heads, batch: Tensor) -> Tensor:
    hidden = network.trunk(batch)
    return network.task(1, hidden) + network.task(2, hidden) + ridge(network)


@pytest.mark.parametrize("products", PRODUCTS)
@drawn(4)
@given(seed=seeds)
def test_a_regularizer_is_a_term_of_the_loss(products: str, seed: int) -> None:
    def in_full(network: Heads, batch: Tensor, *, weights: nn.Module) -> Tensor:
        return data_term(network, batch) + pull(network, weights=weights)

    expected = mlopt.hypergradient(build(in_full, rule("autograd"), seed, regularizer=None))
    result = mlopt.hypergradient(build(data_term, rule(products), seed, regularizer=pull))
    assert distance(result.gradient["logits"], expected.gradient["logits"]) < TOLERANCE[products]
    # The two formulas add the same terms in different orders.
    assert float(result.loss) == pytest.approx(float(expected.loss), rel=1e-13)


def test_a_regularizer_of_the_outermost_level_counts() -> None:
    problem = build(apart, mlopt.Identity(), 0)
    plain = mlopt.hypergradient(problem)
    level = problem["weights"]
    outer = mlopt.Level("weights", level.module, held_out, data=level.data, regularizer=lambda w: 3 * w.logits.sum())
    more = mlopt.hypergradient(mlopt.Problem(outer, problem["network"]))
    assert distance(more.gradient["logits"] - plain.gradient["logits"], 3 * torch.ones(TASKS)) < 1e-12
    assert more.loss - plain.loss == pytest.approx(3 * level.module.logits.sum().item())


@pytest.mark.parametrize("products", PRODUCTS)
def test_a_pullback_through_a_regularizer_alone_does_not_evaluate_the_loss(products: str) -> None:
    loss, coupling = Calls(data_term), Calls(pull)
    problem = build(loss, mlopt.Identity(products=products), 0, regularizer=coupling)
    mlopt.hypergradient(problem)
    assert coupling.count > 0
    assert loss.count == 1, "the first hypergradient inspects it for levels that it does not declare"
    mlopt.hypergradient(problem)
    assert loss.count == 1


def test_the_losses_and_weights_of_a_mixture_are_checked() -> None:
    def unnamed(network: Heads, batch: Tensor) -> mlopt.Mixture:
        return mlopt.Mixture([lambda: ridge(network)], weights="weights")

    def many(network: Heads, batch: Tensor, *, weights: nn.Module) -> mlopt.Mixture:
        return mlopt.Mixture([ridge(network)] * 2, weights="weights")

    def empty(network: Heads, batch: Tensor, *, weights: nn.Module) -> mlopt.Mixture:
        return mlopt.Mixture([], weights="weights")

    def wide(network: Heads, batch: Tensor, *, weights: nn.Module) -> mlopt.Mixture:
        return mlopt.Mixture(
            {"rows": lambda: batch.sum(1)} | {f"{k}": lambda: ridge(network) for k in range(2)}, "weights"
        )

    sentences = {
        many: r"returned shape \(3,\).*each of the 2 losses",
        empty: "it has no loss",
        wide: r"loss 'rows' of a Mixture has shape \(8,\).*take its mean",
    }
    for loss, sentence in sentences.items():
        with pytest.raises(mlopt.ProblemError, match=sentence):
            mlopt.hypergradient(build(loss, rule("autograd"), 0))
    with pytest.raises(mlopt.ProblemError, match="weighed by 'weights', which it does not refer to"):
        mlopt.hypergradient(build(unnamed, rule("autograd"), 0, regularizer=pull))


def test_the_value_of_a_loss_is_checked() -> None:
    returned: Any = None

    def loss(network: Heads, batch: Tensor, *, weights: nn.Module) -> Any:
        return returned

    sentences = {
        "'a', 'b'; it must hold 'loss'": {"a": 1, "b": 2},
        "returned 'gradient_norm', a column that a run writes": {"loss": torch.ones(()), "gradient_norm": 1.0},
        "is a float; it must be a scalar tensor": 1.0,
        r"has shape \(2,\); it must be a scalar": torch.ones(2),
    }
    for sentence, value in sentences.items():
        returned = value
        with pytest.raises(mlopt.ProblemError, match="the loss of level 'network'.*" + sentence):
            mlopt.hypergradient(build(loss, rule("autograd"), 0))
