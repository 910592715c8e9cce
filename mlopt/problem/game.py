"""A game: levels that refer to each other, as one level that is solved where none of them can improve alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from ..errors import EstimatorError, ProblemError
from .level import Level
from .losses import evaluate_loss, evaluate_regularizer
from .residual import evaluate_residual

__all__ = ["game"]

#: The arguments that a player may have.
_OF_PLAYERS = ("name", "module", "loss", "residual", "regularizer", "_device")


def game(name: str, *players: Level, **options: Any) -> Level:
    """Return a Nash game of several players as one level: each has a loss of its own, which the others change as well.

    With f_i(x_i, x_-i, u) the loss of player i, the level is solved where each player is stationary while the others stand still:

        F(x, u) = (d f_1 / d x_1, ..., d f_n / d x_n) = 0.

    F is not the gradient of a function unless the game has a potential, so its derivative is not symmetric. The module of the
    level is an `nn.ModuleDict`: other losses refer to the game by its name, and read `game["player"]()`. With
    `optimizer=partial(SGD, lr=0.1)`, a step of the level is one of simultaneous gradient play.

    Two levels of a `Problem` that refer to each other are not a game but leader and follower: the outer one knows how the inner
    one responds.

    Args:
        name: the name of the game in the losses of other levels.
        players: two levels or more, with a name, a module and a loss (or a residual) each, and no further options. Their losses
            name each other, and levels outside the game. All receive the batch of the game. A player who maximises returns the
            negative of the value.
        options: further arguments of the level, as in `Level`: data, optimizer or solver, steps, estimator, clip and so on.

    Returns:
        A level with a residual.

    Raises:
        ProblemError: there are fewer than two players, two have the same name or variables, or one has options of its own.

    Source: Fiez, Chasnov & Ratliff 2020 (arXiv 1906.01217), for games of both kinds.

    Example:
        >>> market = mlopt.game(
        ...     "market",
        ...     mlopt.Level("a", mlopt.variables(torch.ones(1) / 3), lambda a, _, *, b, cost: a() * (a() + b() + cost() - 1)),
        ...     mlopt.Level("b", mlopt.variables(torch.ones(1) / 3), lambda b, _, *, a: b() * (a() + b() - 1)),
        ...     estimator=mlopt.Dense(),
        ... )
        >>> cost = mlopt.Level("cost", mlopt.variables(torch.zeros(1)), lambda cost, _, *, market: market["b"]().sum())
        >>> mlopt.hypergradient(mlopt.Problem(cost, market)).gradient["value"]  # b = (1 + cost) / 3
        tensor([0.3333])
    """
    if "module" in options or "loss" in options or "residual" in options:
        raise ProblemError(f"game {name!r}: its players determine module, loss and residual; leave these arguments out")
    if len(players) < 2:
        raise ProblemError(f"game {name!r}: it has {len(players)} players; give at least two levels")
    _check_players(name, players)
    try:
        modules = nn.ModuleDict({player.name: player.module for player in players})
    except KeyError as error:
        raise ProblemError(f"game {name!r}: a player cannot have this name: {error}; rename it") from error
    return Level(name, modules, residual=_Conditions(name, players), **options)


def _check_players(name: str, players: Sequence[Level]) -> None:
    names, owners = [name], dict[int, str]()
    for player in players:
        if not isinstance(player, Level):
            raise ProblemError(f"game {name!r}: a player is a {type(player).__name__}; give levels, mlopt.Level(...)")
        if player.name in names:
            raise ProblemError(f"game {name!r}: {player.name!r} is the name of two players, or of the game; rename one")
        if name in player.references:
            raise ProblemError(
                f"game {name!r}: player {player.name!r} refers to the game; let it refer to the other players by their names"
            )
        names.append(player.name)
        for field in attrs.fields(Level):
            given = getattr(player, field.name)
            changed = given is not None if field.default is None else given != field.default
            if field.init and field.name not in _OF_PLAYERS and changed:
                raise ProblemError(
                    f"game {name!r}: player {player.name!r} has {field.name}={given!r}, and the game is solved as one level; "
                    f"give {field.name} to the game"
                )
        for parameter in player.parameters:
            if owners.setdefault(id(parameter), player.name) != player.name:
                raise ProblemError(
                    f"game {name!r}: players {owners[id(parameter)]!r} and {player.name!r} train the same tensor; give one of "
                    "them a copy (copy.deepcopy), or freeze it if neither should train it"
                )


class _Conditions:
    """The residual of a game: the gradient of each player by its own variables."""

    def __init__(self, name: str, players: Sequence[Level]) -> None:
        self._name, self._players = name, tuple(players)
        own = {player.name for player in players}
        outside = dict.fromkeys(ref for player in players for ref in player.references if ref not in own)
        kinds = inspect.Parameter
        self.__signature__ = inspect.Signature(
            [
                kinds("players", kinds.POSITIONAL_ONLY),
                kinds("batch", kinds.POSITIONAL_ONLY),
                *(kinds(ref, kinds.KEYWORD_ONLY) for ref in outside),
            ]
        )

    def __repr__(self) -> str:
        return f"the gradients of {', '.join(player.name for player in self._players)}"

    def __call__(self, players: nn.ModuleDict, batch: Any, **outside: nn.Module) -> list[Tensor]:
        modules = {**outside, **players}
        return [entry for player in self._players for entry in self._own(player, modules, batch)]

    def _own(self, player: Level, modules: Mapping[str, nn.Module], batch: Any) -> Sequence[Tensor]:
        variables = player.parameters
        if player.residual is not None:
            named = dict(zip(player.parameter_names, variables, strict=True))
            return evaluate_residual(player, modules, batch, named)
        if not variables:  # as a pure function of some blocks
            raise EstimatorError(
                f"game {self._name!r}: its residual is made of gradients by autograd, which torch.func cannot transform; use "
                "products='autograd' or 'finite_difference'"
            )
        value = evaluate_loss(player, modules, batch).total(modules)
        if player.regularizer is not None:
            value = value + evaluate_regularizer(player, modules)
        gradient: Sequence[Tensor | None] = (None,) * len(variables)
        if value.requires_grad:
            gradient = torch.autograd.grad(value, variables, create_graph=True, allow_unused=True)
        if all(entry is None for entry in gradient):
            raise ProblemError(
                f"game {self._name!r}: the loss of player {player.name!r} does not depend on its own variables; does it use its "
                "first argument?"
            )
        return [torch.zeros_like(v) if entry is None else entry for v, entry in zip(variables, gradient, strict=True)]
