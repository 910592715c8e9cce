"""Law 4: nothing moves. Parameters, buffers, optimisers, `.grad`, generators and data are bit-identical afterwards."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import numpy as np
import pytest
import torch
from core_cases import ESTIMATORS, PRODUCTS, distance
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mlopt
from mlopt.testing.side_effects import same, snapshot, train_a_little


class Restless(nn.Module):
    """A network in train mode with BatchNorm, dropout and two buffers, one changed in place and one replaced."""

    in_place: Tensor
    replaced: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("in_place", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(4))
        self.register_buffer("absent", None)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(self.first(inputs))
        self.in_place += 1
        self.replaced = self.replaced + hidden.detach().mean(0)
        return self.last(self.dropout(torch.tanh(hidden))).squeeze(1)


def training_loss(network: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
    inputs, targets = batch
    noise = random.random() + float(np.random.rand()) + torch.rand(len(targets), dtype=targets.dtype)
    losses = (network(inputs) - targets + 0.01 * noise).square()
    return (weights().sigmoid() * losses).mean() + 0.05 * sum(p.square().sum() for p in network.parameters())


def validation_loss(weights: nn.Module, batch: Any, *, network: nn.Module) -> Tensor:
    inputs, targets = batch
    return (network(inputs) - targets).square().mean() + 0.1 * weights().square().sum()


def build(estimator: mlopt.Estimator, dtype: torch.dtype, loss: Any = training_loss) -> mlopt.Problem:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(), _default(torch.float32):
        torch.manual_seed(0)
        network = Restless().to(dtype)
    inputs, targets = (
        torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype) for shape in ((8, 3), (8,))
    )
    batches = TensorDataset(inputs, targets)
    weights = mlopt.variables(torch.zeros(8, dtype=dtype))
    return mlopt.Problem(
        mlopt.Level("weights", weights, validation_loss, data=[(inputs, targets)]),
        mlopt.Level("network", network, loss, data=DataLoader(batches, 8, shuffle=True), estimator=estimator),
    )


@contextlib.contextmanager
def _default(dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_nothing_moves(name: str, products: str, dtype: torch.dtype) -> None:
    problem = build(ESTIMATORS[name](products), dtype)
    optimizers = train_a_little(problem)
    before = snapshot(problem, optimizers)
    result = mlopt.hypergradient(problem)
    assert torch.isfinite(result.gradient["value"]).all()
    assert result.gradient["value"].any()
    assert same(before, snapshot(problem, optimizers))


def test_a_snapshot_sees_a_step() -> None:
    problem = build(mlopt.Identity(), torch.float32)
    optimizers = train_a_little(problem)
    before = snapshot(problem, optimizers)
    problem["network"].module(torch.ones(2, 3, dtype=torch.float32))
    after = snapshot(problem, optimizers)
    moved = {key for key in before if not same(before[key], after[key])}
    buffers = {"in_place", "replaced", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert moved == {"generator of torch", *(f"network.{name}" for name in buffers)}


@pytest.mark.parametrize("products", PRODUCTS)
def test_a_loss_that_sets_the_mode_decides_for_itself_alone(products: str) -> None:
    """The outer loss evaluates the network in eval mode; the inner level is solved in train mode, in which it was given."""

    def outer(weights: nn.Module, batch: Any, *, network: nn.Module) -> Tensor:
        network.eval()
        return validation_loss(weights, batch, network=network)

    def outer_that_restores(weights: nn.Module, batch: Any, *, network: nn.Module) -> Tensor:
        loss = outer(weights, batch, network=network)
        network.train()
        return loss

    gradients = []
    for loss in (outer, outer_that_restores):
        problem = build(mlopt.Dense(products=products, damping=1.0), torch.float64)
        weights = problem["weights"]
        level = mlopt.Level("weights", weights.module, loss, data=weights.data)
        gradients.append(mlopt.hypergradient(mlopt.Problem(level, problem["network"]), seed=0).gradient["value"])
        assert all(module.training for module in problem["network"].module.modules())
    assert distance(gradients[0], gradients[1]) < 1e-9


class Twice(nn.Module):
    """A network with one linear map under two names, and a norm that another module holds, too."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.first = norm, nn.Linear(3, 3)
        self.second, self.last = self.first, nn.Linear(3, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(self.norm(inputs)))))).squeeze(1)


@pytest.mark.parametrize("products", PRODUCTS)
def test_a_module_under_two_names_keeps_its_tensors(products: str) -> None:
    """torch.func.functional_call leaves its own tensors in a module that it finds under two names."""
    norm = nn.BatchNorm1d(3).requires_grad_(False)
    inner, outer = Twice(norm), Twice(norm)
    inputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))

    def outer_loss(module: nn.Module, batch: Any, *, inner: nn.Module) -> Tensor:
        return (module(inputs) - inner(inputs)).square().mean()

    def inner_loss(module: nn.Module, batch: Any, *, outer: nn.Module) -> Tensor:
        decay = sum(p.square().sum() for p in module.parameters())
        return (module(inputs) - outer(inputs.flip(0))).square().mean() + decay

    level = mlopt.Level("inner", inner, inner_loss, estimator=mlopt.Dense(products=products))
    held = [
        {name: id(t) for named in (m.named_parameters, m.named_buffers) for name, t in named(remove_duplicate=False)}
        for m in (inner, outer)
    ]
    values = [p.detach().clone() for p in (*inner.parameters(), *norm.buffers())]
    first, second = (
        mlopt.hypergradient(mlopt.Problem(mlopt.Level("outer", outer, outer_loss), level)).gradient for _ in range(2)
    )
    assert held == [
        {name: id(t) for named in (m.named_parameters, m.named_buffers) for name, t in named(remove_duplicate=False)}
        for m in (inner, outer)
    ]
    assert all(torch.equal(p, kept) for p, kept in zip((*inner.parameters(), *norm.buffers()), values, strict=True))
    assert all(torch.equal(first[name], second[name]) for name in first)


class StopHereError(Exception):
    """Raised by a loss on purpose."""


@pytest.mark.parametrize(
    ("products", "fatal"),
    [("autograd", 1), *(("forward", k) for k in (1, 2, 3)), *(("finite_difference", k) for k in (1, 2, 3, 4))],
)
def test_nothing_moves_when_a_loss_raises(products: str, fatal: int) -> None:
    """The parameters are restored even if a loss raises while they are displaced for a difference."""
    calls = 0

    def failing(network: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
        nonlocal calls
        calls += 1
        loss = training_loss(network, batch, weights=weights)
        if calls == fatal:
            raise StopHereError
        return loss

    problem = build(mlopt.Neumann(iterations=3, step_size=0.1, products=products), torch.float32, failing)
    optimizers = train_a_little(problem)
    before = snapshot(problem, optimizers)
    with pytest.raises(StopHereError):
        mlopt.hypergradient(problem)
    assert same(before, snapshot(problem, optimizers))


def test_differences_are_taken_at_displaced_parameters() -> None:
    """The tests above rely on this displacement to test that parameters are restored."""
    seen: list[Tensor] = []

    def watched(network: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
        seen.append(network.last.weight.detach().clone())
        return training_loss(network, batch, weights=weights)

    problem = build(mlopt.FiniteDifference(), torch.bfloat16, watched)
    at_rest = problem["network"].module.last.weight.detach().clone()
    mlopt.hypergradient(problem)
    mlopt.hypergradient(problem)  # without the checks of a first one
    above, below = seen[-2:]
    assert not torch.equal(above, at_rest)
    assert not torch.equal(below, at_rest)
    assert not torch.equal(above, below)


@pytest.mark.parametrize("products", PRODUCTS)
def test_training_draws_the_same_with_and_without_a_hypergradient(products: str) -> None:
    """The draws are batches, dropout masks and the loss's numbers from Python and numpy."""

    def run(call: bool) -> list[float]:
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        problem = build(mlopt.ConjugateGradient(iterations=2, products=products), torch.float32)
        stream = mlopt.problem.Stream("network", problem["network"].data, 0, torch.device("cpu"))
        values = []
        for _ in range(3):
            if call:
                mlopt.hypergradient(problem)
            batch = stream.next()
            loss = training_loss(problem["network"].module, batch, weights=problem["weights"].module)
            values.append(loss.item())
        return values

    assert run(call=True) == run(call=False)


def test_the_generator_of_a_loader_does_not_move() -> None:
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(TensorDataset(torch.arange(8.0)), 2, shuffle=True, generator=generator)

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return (module() * batch[0].sum()).sum()

    before = generator.get_state()
    mlopt.hypergradient(mlopt.Problem(mlopt.Level("x", mlopt.variables(torch.ones(1)), loss, data=loader)))
    assert torch.equal(generator.get_state(), before)


def test_repeated_calls_draw_from_their_own_stream() -> None:
    """The masks differ between calls with equal batches; a second problem sees the same sequence of masks."""
    problem, again = (build(mlopt.Identity(), torch.float32) for _ in range(2))
    batches = {"weights": problem["weights"].data[0], "network": problem["weights"].data[0]}
    first, second = (mlopt.hypergradient(problem, batches).gradient["value"] for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(123)
    random.seed(5)
    assert torch.equal(first, mlopt.hypergradient(again, batches).gradient["value"])
    assert torch.equal(second, mlopt.hypergradient(again, batches).gradient["value"])


def test_a_seed_fixes_the_draws_of_the_losses() -> None:
    problem = build(mlopt.Identity(), torch.float32)
    batches = {"weights": problem["weights"].data[0], "network": problem["weights"].data[0]}
    first, second, other = (mlopt.hypergradient(problem, batches, seed=s).gradient["value"] for s in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
