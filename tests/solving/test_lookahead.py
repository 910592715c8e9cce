"""Look-ahead: after the hypergradient is formed, the inner steps are undone; after the outer step they are retaken."""

from __future__ import annotations

import copy
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from option_cases import F64, around_means, decay, nest, steps_of, training, validation, vector
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

import mlopt
from mlopt import Level, Problem
from mlopt.problem import Stream

adam = partial(Adam, lr=0.05)
halving = partial(StepLR, step_size=3, gamma=0.5)
CPU = torch.device("cpu")


class Counted(nn.Module):
    """Counts its calls in a buffer that it replaces on each call, as running averages often do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return inputs


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = [nn.Linear(3, 4), nn.BatchNorm1d(4), Counted(), nn.Tanh(), nn.Linear(4, 1)]
        return nn.Sequential(*layers).to(F64)


def loader(seed: int) -> DataLoader[Any]:
    draws = torch.Generator().manual_seed(seed)
    rows = torch.randn(20, 3, dtype=F64, generator=draws), torch.randn(20, 1, dtype=F64, generator=draws)
    return DataLoader(TensorDataset(*rows), batch_size=4, shuffle=True)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("warmup", [0, 2])
def test_look_ahead_matches_a_plain_loop(steps: int, warmup: int) -> None:
    problem = Problem(
        Level("decay", decay(), validation, data=loader(0), optimizer=adam, scheduler=halving),
        Level(
            "net",
            network(),
            training,
            data=loader(1),
            optimizer=adam,
            scheduler=halving,
            steps=steps,
            warmup=warmup,
            clip=0.5,
            estimator=mlopt.Identity(),
        ),
    )
    mlopt.solve(problem, 6, seed=3, lookahead=True, progress=False)

    net, own = network(), decay()
    inner, outer = adam(net.parameters()), adam(own.parameters())
    schedulers = halving(inner), halving(outer)
    lower, upper = Stream("net", loader(1), 3, CPU), Stream("decay", loader(0), 3, CPU)

    def step(moved: nn.Module, optimizer: Adam, scheduler: StepLR, batch: Any) -> None:
        optimizer.zero_grad()
        training(moved, batch, decay=own)["loss"].backward(inputs=list(moved.parameters()))
        nn.utils.clip_grad_norm_(moved.parameters(), 0.5)
        optimizer.step()
        scheduler.step()

    for _ in range(warmup):
        step(net, inner, schedulers[0], lower.next())
    for _ in range(6):
        batches = [lower.next() for _ in range(steps)]
        ahead = copy.deepcopy(net)
        optimizer = adam(ahead.parameters())
        scheduler = halving(optimizer)
        optimizer.load_state_dict(copy.deepcopy(inner.state_dict()))
        scheduler.load_state_dict(schedulers[0].state_dict())
        for batch in batches:
            step(ahead, optimizer, scheduler, batch)
        loss = validation(own, upper.next(), net=ahead)
        *cotangent, direct = torch.autograd.grad(loss, [*ahead.parameters(), own.value])
        # Only the weight of the first layer meets the outer variables: the mixed product needs no pass of the network.
        own.value.grad = direct + by_weight(ahead, own, cotangent)
        outer.step()
        schedulers[1].step()
        for batch in batches:
            step(net, inner, schedulers[0], batch)
    solved = problem["net"].module
    torch.testing.assert_close(problem["decay"].module.value, own.value, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(solved.state_dict(), net.state_dict(), rtol=1e-12, atol=1e-14)
    assert solved[2].calls.item() == warmup + 6 * steps


def by_weight(net: nn.Sequential, own: Any, cotangent: list[Tensor]) -> Tensor:
    return -2 * own.value.detach().exp() * net[0].weight.detach() * cotangent[0]


def test_a_repeated_solve_sees_the_same_batches_in_the_order_without_look_ahead() -> None:
    plain = steps_of(nest(mlopt.Dense()), 4, seed=5)
    ahead = steps_of(nest(mlopt.Dense()), 4, seed=5, lookahead=True)
    assert len(plain) == 4 * 7
    assert len(ahead) == 4 * 13
    for k in range(4):
        *solve, outer = plain[7 * k : 7 * k + 7]
        assert ahead[13 * k : 13 * k + 13] == [*solve, outer, *solve]


def test_a_repeated_solve_has_the_same_curvature_batches() -> None:
    """The estimator of z draws a batch for each of the two steps of y, and one for the step of x."""

    def curvature(lookahead: bool) -> list[float | None]:
        seen: list[float | None] = []
        rows = DataLoader(torch.arange(100.0, 200.0, dtype=F64), batch_size=None, shuffle=True)
        problem = nest(mlopt.Dense(curvature_data=rows), seen=seen)
        mlopt.solve(problem, 3, seed=5, lookahead=lookahead, progress=False)
        # A pullback evaluates its level many times.
        return [batch for batch, after in pairwise([*seen, None]) if batch != after]

    plain, ahead = curvature(lookahead=False), curvature(lookahead=True)
    assert len(plain) == 9
    for k in range(3):
        *solve, outer = plain[3 * k : 3 * k + 3]
        assert ahead[5 * k : 5 * k + 5] == [*solve, outer, *solve]


@pytest.mark.parametrize("second", [False, True])
def test_after_a_rollback_the_data_continue(second: bool) -> None:
    """A batch with a non-finite loss is skipped, whether the solve that looks ahead meets it, or the second one."""
    batches = [torch.full((1,), float(k), dtype=F64) for k in range(12)]
    seen: list[float] = []

    def inner(own, batch, *, x):
        seen.append(batch.item())
        bad = batch == 2 and seen.count(2.0) == (2 if second else 1)
        return (own() - x()).square().sum() + (float("nan") if bad else 0.0)

    def outer(own, batch, *, y):
        return y().square().sum() + own().square().sum()

    problem = Problem(
        Level("x", vector(1.0), outer, optimizer=adam),
        Level("y", vector(1.0), inner, data=batches, optimizer=adam, steps=2, estimator=Forgetful()),
    )
    history = mlopt.solve(problem, 3, lookahead=True, on_nonfinite="rollback", progress=False).history
    assert history.column("rollbacks") == [0, 1, 1]
    assert seen == [0, 1, 0, 1, *([2, 3, 2, 4, 5, 4, 5] if second else [2, 3, 4, 3, 4])]


def test_a_buffer_that_the_solve_ahead_binds_is_unbound_before_the_second() -> None:
    problem = around_means([[1.0, 2.0], [5.0, -1.0], [0.0, 3.0]])
    mlopt.solve(problem, 1, lookahead=True, progress=False)
    assert problem["net"].module.mean.item() == (1.5 + 2) / 2


class Forgetful(mlopt.Estimator):
    """An estimator that evaluates no loss and returns no cotangents."""

    def linearize(self, point: Any, level: str) -> Any:
        return _Forgetting()


class _Forgetting(mlopt.problem.Linearization):
    def __init__(self) -> None:
        self.blocks, self.arguments, self.report = ("y",), ("x",), mlopt.Report(estimator="none")

    def pullback(self, cotangent: Any, wanted: Any = None) -> dict[str, Any]:
        return {}
