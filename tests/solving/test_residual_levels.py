"""Runs with levels that a residual defines: their steps, options, stillness and resumption."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from condition_cases import equilibrium
from core_cases import Restless, distance, flat
from option_cases import F64, vector
from states import assert_same_state
from torch import Tensor, nn
from torch.optim import SGD, Adam

import mlopt
from mlopt import Level, Problem
from mlopt.testing import same, snapshot

MATRIX = torch.tensor([[0.3, 0.6], [-0.6, 0.3]], dtype=F64)


def contraction(outer: dict[str, Any] | None = None, **options: Any) -> Problem:
    """Return the fixed point x = M x + batch u inside an outer level that has x at a target."""
    given = {
        "residual": lambda x, batch, *, u: x() - MATRIX @ x() - (1.0 if batch is None else batch) * u(),
        "optimizer": partial(SGD, lr=1.0),
        "estimator": mlopt.GMRES(),
    } | options
    return Problem(
        Level(
            "u",
            vector(1.0, -1.0),
            lambda u, batch, *, x: (x() - 1).square().sum(),
            **{"optimizer": partial(SGD, lr=0.1), **(outer or {})},
        ),
        Level("x", vector(0.0, 0.0), **given),
    )


def test_steps_of_sgd_with_rate_one_iterate_the_map() -> None:
    problem = contraction(outer={"optimizer": partial(SGD, lr=0.0)}, steps=7)
    history = mlopt.solve(problem, 1, progress=False).history
    x, u = torch.zeros(2, dtype=F64), problem["u"].module().detach()
    for _ in range(7):
        residual = x - MATRIX @ x - u
        x = MATRIX @ x + u
    assert distance(problem["x"].module().detach(), x) < 1e-14
    assert history.column("x/residual") == [pytest.approx(float(residual.norm()))]


def test_a_run_converges_to_the_target() -> None:
    """The outer solution is u = (1 - M) (1, 1)."""
    problem = contraction(steps=40)
    mlopt.solve(problem, 200, progress=False)
    torch.testing.assert_close(
        problem["u"].module().detach(),
        (torch.eye(2, dtype=F64) - MATRIX) @ torch.ones(2, dtype=F64),
        rtol=1e-6,
        atol=0.0,
    )


def test_batches_are_averaged_and_clipped() -> None:
    batches = [torch.tensor(2.0, dtype=F64), torch.tensor(6.0, dtype=F64)]
    for clip, length in ((None, 4 * 2**0.5), (0.5, 0.5)):
        problem = contraction(outer={"optimizer": partial(SGD, lr=0.0)}, data=batches, accumulate=2, clip=clip)
        history = mlopt.solve(problem, 1, progress=False).history
        x = problem["x"].module().detach()
        assert distance(x, length / 2**0.5 * torch.tensor([1.0, -1.0], dtype=F64)) < 1e-6
        assert history.column("x/residual") == [pytest.approx(4 * 2**0.5)]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_steps_in_half_precision_follow_the_same_residual(precision: str) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(8, 3, generator=generator)

    def problem(**options: Any) -> Problem:
        model = nn.Linear(3, 3)
        with torch.no_grad():
            model.weight.copy_(torch.linspace(-1, 1, 9).reshape(3, 3))
            model.bias.zero_()

        def residual(model: Any, batch: Any, *, u: Any) -> list[Tensor]:
            return [model.weight + 0.1 * model(inputs).T @ inputs, model(inputs).mean(0) - u()]

        return Problem(
            Level(
                "u", mlopt.variables(torch.ones(3)), lambda u, batch, *, x: x.bias.sum(), optimizer=partial(SGD, lr=0.0)
            ),
            Level("x", model, residual=residual, optimizer=partial(SGD, lr=0.1), estimator=mlopt.Identity(), **options),
        )

    ends = []
    for options in ({}, {"precision": precision}):
        case = problem(**options)
        mlopt.solve(case, 1, progress=False)
        ends.append(torch.cat([p.detach().reshape(-1) for p in case["x"].parameters]))
    assert 1e-6 < distance(ends[1], ends[0]) < 0.02


def anderson(x: Any, batch: Any, *, u: Any) -> None:
    """Anderson's acceleration with a memory of three."""
    points, residuals = [], []
    state = x.value.detach().clone()
    with torch.no_grad():
        for _ in range(12):
            residual = MATRIX @ state + u() - state
            points, residuals = [*points, state][-4:], [*residuals, residual][-4:]
            state = state + residual
            if len(points) > 1:
                changes = torch.stack([b - a for a, b in itertools.pairwise(residuals)], 1)
                moves = torch.stack([b - a for a, b in itertools.pairwise(points)], 1)
                weights = torch.linalg.lstsq(changes, residual[:, None], driver="gelsd").solution[:, 0]
                state = state - (moves + changes) @ weights
        x.value.data.copy_(state)


def by_scipy(x: Any, batch: Any, *, u: Any) -> None:
    root = pytest.importorskip("scipy.optimize").root
    right = u().detach().numpy()
    solution = root(lambda state: state - MATRIX.numpy() @ state - right, x.value.detach().numpy(), tol=1e-13)
    x.value.data.copy_(torch.from_numpy(solution.x))


@pytest.mark.parametrize("solver", [anderson, by_scipy])
def test_solvers_take_a_level_to_its_fixed_point(solver: Callable[..., None]) -> None:
    problem = contraction(optimizer=None, solver=solver)
    inverse = torch.linalg.inv(torch.eye(2, dtype=F64) - MATRIX)
    u = problem["u"].module().detach()
    result = mlopt.hypergradient(problem)
    assert distance(flat(result.gradient), 2 * inverse.T @ (inverse @ u - 1)) < 1e-8
    assert result.reports["x"].gradient_norm < 1e-10
    assert result.reports["x"].stationarity < 1e-10
    history = mlopt.solve(problem, 2, progress=False).history
    assert max(history.column("x/gradient_norm")) < 1e-10


def test_a_solver_that_stops_early_is_reported() -> None:
    problem = contraction(optimizer=None, solver=lambda x, batch, *, u: None)
    with pytest.warns(mlopt.TrustWarning, match="its solver left it about 100%"):
        mlopt.hypergradient(problem)


def test_real_steps_see_the_same_solution() -> None:
    """The outer derivative by real steps of the map is that of the fixed point, once there are enough steps."""
    problem = contraction(outer={"response": mlopt.RealSteps(steps=80)})
    exact = contraction()
    exact["x"].module.value.data.copy_(
        torch.linalg.solve(torch.eye(2, dtype=F64) - MATRIX, exact["u"].module().detach())
    )
    gradients = [flat(mlopt.hypergradient(case).gradient) for case in (problem, exact)]
    assert distance(gradients[0], gradients[1]) < 1e-6


def stateful(estimator: mlopt.Estimator) -> Problem:
    """Return a network with BatchNorm and dropout, whose residual is its gradient plus what no loss has."""
    network = Restless().double()
    generator = torch.Generator().manual_seed(0)
    data = [
        (torch.randn(6, 2, generator=generator, dtype=F64), torch.randn(6, generator=generator, dtype=F64))
        for _ in range(5)
    ]

    def residual(network: Any, batch: Any, *, u: Any) -> dict[str, Tensor]:
        variables = dict(network.named_parameters())
        loss = (u().sigmoid() * (network(batch[0]) - batch[1]).square()).mean()
        loss = loss + 0.05 * sum(p.square().sum() for p in variables.values())
        gradient = torch.autograd.grad(loss, list(variables.values()), create_graph=True)
        return {name: g + 0.02 * v.roll(1, 0) for (name, v), g in zip(variables.items(), gradient, strict=True)}

    return Problem(
        Level(
            "u",
            mlopt.variables(torch.zeros(6, dtype=F64)),
            lambda u, batch, *, network: (network(batch[0]) - batch[1]).square().mean(),
            data=data[:2],
            optimizer=partial(Adam, lr=0.05),
        ),
        Level(
            "network",
            network,
            residual=residual,
            data=torch.utils.data.DataLoader(data, batch_size=None, shuffle=True),
            optimizer=partial(SGD, lr=0.1, momentum=0.5),
            steps=3,
            estimator=estimator,
        ),
    )


ESTIMATORS = [
    mlopt.GMRES(iterations=4, warm_start=True),
    mlopt.GMRES(iterations=4, products="finite_difference"),
    mlopt.Neumann(iterations=3, step_size=0.1),
    mlopt.Identity(scale=0.1),
]


@pytest.mark.filterwarnings("ignore::mlopt.TrustWarning")
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_nothing_moves(estimator: mlopt.Estimator) -> None:
    problem = stateful(estimator)
    for level in problem:
        for parameter in level.parameters:
            parameter.grad = torch.full_like(parameter, 0.3)
    batches = {level.name: next(iter(level.data)) for level in problem}
    before = snapshot(problem)
    first = mlopt.hypergradient(problem, batches, seed=3)
    assert same(before, snapshot(problem))
    assert torch.equal(flat(first.gradient), flat(mlopt.hypergradient(problem, batches, seed=3).gradient))
    assert float(flat(first.gradient).norm()) > 0


@pytest.mark.filterwarnings("ignore::mlopt.TrustWarning")
@pytest.mark.parametrize("estimator", ESTIMATORS[:2], ids=str)
def test_a_resumed_run_is_bit_equal(estimator: mlopt.Estimator, tmp_path: Path) -> None:
    whole = stateful(estimator)
    mlopt.solve(whole, 6, seed=0, progress=False, checkpoint=mlopt.Checkpoints(tmp_path / "whole", every=6))
    for steps in (3, 6):
        cut = stateful(estimator)
        mlopt.solve(
            cut,
            steps,
            seed=0,
            progress=False,
            checkpoint=mlopt.Checkpoints(tmp_path / "cut", every=3),
            resume=steps == 6,
        )
    states = [mlopt.Checkpoints(tmp_path / name).newest()[2] for name in ("whole", "cut")]
    assert_same_state(states[0]["engine"], states[1]["engine"])
    assert_same_state(states[0]["history"], states[1]["history"])


def test_random_numbers_of_training_do_not_depend_on_the_estimator() -> None:
    ends = []
    for estimator in (mlopt.Identity(scale=0.1), mlopt.GMRES(iterations=4)):
        problem = stateful(estimator)
        torch.manual_seed(1)
        mlopt.solve(problem, 1, seed=0, progress=False)
        ends.append(
            torch.cat([*(p.detach().reshape(-1) for p in problem["network"].parameters), torch.rand(3, dtype=F64)])
        )
    assert torch.equal(ends[0], ends[1])


def test_memory_does_not_grow_with_the_iterations() -> None:
    """A step drops its graph before the next one: the most graphs alive at once do not depend on the number of steps."""
    most = [Watched.most_alive(steps) for steps in (5, 50)]
    assert 1 <= most[0] == most[1] <= 4


class Watched(torch.autograd.Function):
    """The identity, whose nodes count how many of them are alive."""

    alive = peak = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.token = _Token()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g

    @classmethod
    def most_alive(cls, steps: int) -> int:
        cls.alive = cls.peak = 0
        case, _ = equilibrium(3)
        own = case["layer"].residual
        problem = Problem(
            Level("u", case["u"].module, case["u"].loss, optimizer=partial(SGD, lr=0.01)),
            Level(
                "layer",
                case["layer"].module,
                residual=lambda x, batch, *, u: cls.apply(own(x, batch, u=u)),
                optimizer=partial(SGD, lr=1.0),
                steps=steps,
                estimator=mlopt.GMRES(),
            ),
        )
        mlopt.solve(problem, 1, progress=False)
        return cls.peak


class _Token:
    def __init__(self) -> None:
        Watched.alive += 1
        Watched.peak = max(Watched.peak, Watched.alive)

    def __del__(self) -> None:
        Watched.alive -= 1
