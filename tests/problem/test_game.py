"""Games: equilibria and their derivatives against closed forms, leader and follower, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from core_cases import distance, drawn, gradient_of, seeds
from hypothesis import given
from torch import Tensor
from torch.optim import SGD

import mlopt
from mlopt import Level, Problem

SIZE = 3


class Quadratic:
    """Two players with f_i = <x_i, A_i x_i> / 2 + <x_i, B_i x_j + C_i u + c_i>, inside an outer level.

    At the equilibrium A_i x_i + B_i x_j + C_i u + c_i = 0 for both.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        draws = [torch.randn(SIZE, SIZE, generator=generator) for _ in range(6)]
        own = [draw @ draw.T / SIZE + 2 * torch.eye(SIZE) for draw in draws[:2]]
        across, outside = draws[2:4], draws[4:]
        self.own, self.across, self.outside = own, [0.5 * b for b in across], outside
        self.constant = [torch.randn(SIZE, generator=generator) for _ in range(2)]
        self.weight = [torch.randn(SIZE, generator=generator) for _ in range(2)]
        self.outer = torch.randn(SIZE, generator=generator)

    def loss(self, i: int, x: Tensor, other: Tensor, u: Tensor) -> Tensor:
        linear = self.across[i] @ other + self.outside[i] @ u + self.constant[i]
        return x @ (self.own[i] @ x) / 2 + x @ linear

    def outer_loss(self, u: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return a @ self.weight[0] + b @ self.weight[1] + a @ b + u @ u

    def equilibrium(self, u: Tensor) -> tuple[Tensor, Tensor]:
        matrix = torch.cat([torch.cat([self.own[0], self.across[0]], 1), torch.cat([self.across[1], self.own[1]], 1)])
        right = torch.cat([outside @ u + c for outside, c in zip(self.outside, self.constant, strict=True)])
        a, b = torch.linalg.solve(matrix, -right).split(SIZE)
        return a, b

    def led(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a becomes if it knows that b = -A_2^-1 (B_2 a + ...), and b."""
        response = -torch.linalg.solve(self.own[1], self.across[1])
        shift = -torch.linalg.solve(self.own[1], self.outside[1] @ u + self.constant[1])
        coupling = self.across[0] @ response
        right = self.across[0] @ shift + self.outside[0] @ u + self.constant[0]
        a = torch.linalg.solve(self.own[0] + coupling + coupling.T, -right)
        return a, response @ a + shift

    def exact(self, solve: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        u = self.outer.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.outer_loss(u, *solve(u)), u)
        return gradient

    def players(self, a: Tensor, b: Tensor, **options: Any) -> tuple[Level, Level]:
        return (
            Level("a", mlopt.variables(a), lambda a, batch, *, b, u: self.loss(0, a(), b(), u()), **options),
            Level("b", mlopt.variables(b), lambda b, batch, *, a, u: self.loss(1, b(), a(), u()), **options),
        )

    def game(self, a: Tensor, b: Tensor, **options: Any) -> Problem:
        def loss(u: Any, batch: Any, *, game: Any) -> Tensor:
            return self.outer_loss(u(), game["a"](), game["b"]())

        options = {"estimator": mlopt.GMRES(rtol=1e-13)} | options
        return Problem(
            Level("u", mlopt.variables(self.outer), loss, optimizer=partial(SGD, lr=0.0)),
            mlopt.game("game", *self.players(a, b), **options),
        )


@pytest.mark.parametrize("products", ["autograd", "finite_difference"])
@drawn(15)
@given(seed=seeds)
def test_the_derivative_of_an_equilibrium_has_the_closed_form(products: str, seed: int) -> None:
    case = Quadratic(seed)
    problem = case.game(*case.equilibrium(case.outer), estimator=mlopt.GMRES(rtol=1e-13, products=products))
    assert distance(gradient_of(problem), case.exact(case.equilibrium)) < 1e-8


def test_gradient_play_ends_at_the_equilibrium() -> None:
    case = Quadratic(0)
    problem = case.game(torch.zeros(SIZE), torch.zeros(SIZE), optimizer=partial(SGD, lr=0.2), steps=600)
    solution = mlopt.solve(problem, steps=1, progress=False)
    a, b = (parameter.detach() for parameter in problem["game"].module.parameters())
    expected = case.equilibrium(case.outer)
    assert distance(a, expected[0]) < 1e-8
    assert distance(b, expected[1]) < 1e-8
    assert distance(problem["u"].module.value.grad, case.exact(case.equilibrium)) < 1e-8
    assert solution.history.column("game/residual")[-1] < 1e-8


def test_two_levels_that_refer_to_each_other_are_leader_and_follower() -> None:
    """They have another solution, and another derivative, both of which their nested levels have right."""
    case = Quadratic(1)
    leader = case.led(case.outer)
    players = case.players(*leader, estimator=mlopt.Dense())
    problem = Problem(
        Level("u", mlopt.variables(case.outer), lambda u, batch, *, a, b: case.outer_loss(u(), a(), b())), *players
    )
    assert distance(gradient_of(problem), case.exact(case.led)) < 1e-8
    assert distance(case.exact(case.led), case.exact(case.equilibrium)) > 0.05
    assert distance(leader[0], case.equilibrium(case.outer)[0]) > 0.05


def test_a_zero_sum_game_ends_at_its_saddle_point() -> None:
    """f = x y + u x - y with x minimising and y maximising: x = 1 and y = -u. Simultaneous play alone would circle round it."""

    def loss(x: Any, y: Any, u: Any) -> Tensor:
        return (x() * y() + u() * x() - y()).sum()

    problem = Problem(
        Level(
            "u",
            mlopt.variables(torch.full((1,), 3.0)),
            lambda u, batch, *, game: (game["y"]().square() + 5 * game["x"]()).sum(),
        ),
        mlopt.game(
            "game",
            Level("x", mlopt.variables(torch.ones(1)), lambda x, batch, *, y, u: loss(x, y, u)),
            Level("y", mlopt.variables(torch.full((1,), -3.0)), lambda y, batch, *, x, u: -loss(x, y, u)),
            estimator=mlopt.Dense(),
        ),
    )
    torch.testing.assert_close(gradient_of(problem), torch.tensor([6.0]))
    assert mlopt.hypergradient(problem).reports["game"].converged is True


def test_three_players_with_regularizers_a_residual_and_a_batch() -> None:
    """Player c is a condition of its own; the residual is that by hand, and the derivative that of re-solved problems."""

    def a(x: Any, batch: Any, *, b: Any, u: Any) -> dict[str, Any]:
        return {"loss": (batch * x().square() + x() * b() * u()).sum(), "size": x().norm()}

    players = (
        Level("a", mlopt.variables(torch.ones(2)), a, regularizer=lambda x: x().square().square().sum() + x().sum()),
        Level("b", mlopt.variables(torch.ones(2)), lambda b, batch, *, a, c: (b().square() - b() * (a() + c().sin())).sum()),
        Level("c", mlopt.variables(torch.ones(2)), residual=lambda c, batch, *, b: c() - torch.tanh(b()) - 0.3),
    )  # fmt: skip
    problem = Problem(
        Level(
            "u",
            mlopt.variables(torch.ones(2)),
            lambda u, batch, *, game: sum(p.square().sum() for p in game.parameters()),
        ),
        mlopt.game("game", *players, data=[torch.tensor([1.0, 2.0])], estimator=mlopt.GMRES()),
    )
    level, batch = problem["game"], torch.tensor([1.0, 2.0])
    a, b, c = (0.3 * parameter for parameter in level.parameters)
    with torch.no_grad():
        for parameter in level.parameters:
            parameter.mul_(0.3)
    first, second, third = level.definition(level.module, batch, u=problem["u"].module)
    torch.testing.assert_close(first, 2 * batch * a + b * 1.0 + 4 * a**3 + 1)
    torch.testing.assert_close(second, 2 * b - a - c.sin())
    torch.testing.assert_close(third, c - b.tanh() - 0.3)
    check = mlopt.check_hypergradient(problem, oracle="resolve", tolerance=100.0)
    assert check.error_at_solution < 1e-7


def test_a_player_that_does_not_use_its_variables_is_refused() -> None:
    problem = Problem(
        Level("u", mlopt.variables(torch.ones(1)), lambda u, batch, *, game: game["a"]().sum()),
        mlopt.game(
            "game",
            Level("a", mlopt.variables(torch.ones(1)), lambda a, batch, *, b, u: (b() * u()).sum()),
            Level("b", mlopt.variables(torch.ones(1)), lambda b, batch, *, a: (a() * b()).sum()),
            estimator=mlopt.Dense(),
        ),
    )
    with pytest.raises(mlopt.ProblemError, match="the loss of player 'a' does not depend on its own variables"):
        mlopt.hypergradient(problem)


def test_forward_products_are_refused_with_the_remedy() -> None:
    case = Quadratic(0)
    problem = case.game(*case.equilibrium(case.outer), estimator=mlopt.GMRES(products="forward"))
    with pytest.raises(
        mlopt.EstimatorError, match=r"made of gradients by autograd.*use products='autograd' or 'finite_difference'"
    ):
        mlopt.hypergradient(problem)


def player(name: str = "a", **options: Any) -> Level:
    return Level(
        name,
        options.pop("module", mlopt.variables(torch.ones(1))),
        options.pop("loss", lambda x, batch: x().sum()),
        **options,
    )


SHARED = mlopt.variables(torch.ones(1))


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: mlopt.game("game", player()), "game 'game': it has 1 players; give at least two levels"),
        (lambda: mlopt.game("game", player(), 3), "game 'game': a player is a int; give levels"),
        (lambda: mlopt.game("game", player(), player()), "'a' is the name of two players, or of the game; rename one"),
        (lambda: mlopt.game("a", player(), player("b")), "'a' is the name of two players, or of the game; rename one"),
        (lambda: mlopt.game("game", player(), player("keys")), "game 'game': a player cannot have this name"),
        (lambda: mlopt.game("game", player(), player("b", steps=3)), "player 'b' has steps=3.*give steps to the game"),
        (lambda: mlopt.game("game", player(), player("b", data=[1])), r"player 'b' has data=\[1\].*give data to the game"),
        (lambda: mlopt.game("game", player(), player("b", loss=lambda b, batch, *, game: b())), "player 'b' refers to the game"),
        (lambda: mlopt.game("game", player(module=SHARED), player("b", module=SHARED)), "train the same tensor"),
        (lambda: mlopt.game("game", player(), player("b"), loss=lambda x, batch: x), "its players determine module, loss"),
    ],
)  # fmt: skip
def test_games_that_cannot_be_are_refused(build: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(mlopt.ProblemError, match=sentence):
        build()
