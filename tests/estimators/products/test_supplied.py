"""Products that a regularizer supplies: used by every kind, verified, and filled with zeros."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import pytest
import torch
from core_cases import distance
from torch import Tensor, nn
from torch.optim import SGD

import mlopt

SIZE = 4


class Pull:
    """r(x, u) = ||x - u||^4 / 4, with its products, or wrong ones: those times a factor."""

    def __init__(self, problem: dict[str, Tensor], factor: float = 1.0) -> None:
        self.values, self.factor, self.products, self.evaluations = problem, factor, 0, 0

    def __call__(self, x: nn.Module, *, u: nn.Module) -> Tensor:
        self.evaluations += 1
        return (x.value - u.value).square().sum().square() / 4

    def product(
        self, direction: Mapping[str, Sequence[Tensor]], wanted: Sequence[str]
    ) -> dict[str, list[Tensor | None]]:
        self.products += 1
        gap = (self.values["x"] - self.values["u"]).detach().to(next(iter(direction.values()))[0])
        along = sum((1.0 if level == "x" else -1.0) * vectors[0] for level, vectors in direction.items())
        total = self.factor * (gap.square().sum() * along + 2 * gap * (gap @ along))
        return {level: [total if level == "x" else -total, *[None] * (level == "x")] for level in wanted}


class Pair(nn.Module):
    """The variables x, and one that the regularizer does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.other = nn.Parameter(torch.randn(SIZE)), nn.Parameter(torch.randn(2))


def problem_of(estimator: mlopt.Estimator, factor: float = 1.0, *, maximize: bool = False) -> tuple[Any, Pull]:
    torch.manual_seed(0)
    sign = -1.0 if maximize else 1.0
    u, x = mlopt.variables(torch.randn(SIZE)), Pair()
    pull = Pull({"x": x.value, "u": u.value}, factor)

    def inner(x: Pair, batch: Any) -> Tensor:
        return sign * (3 * x.value.square().sum() + x.value.pow(3).sum() / 9 + x.other.square().sum())

    def outer(u: nn.Module, batch: Any, *, x: Pair) -> Tensor:
        return x.value.cos().sum() + x.other.sum() * x.value[0]

    level = mlopt.Level(
        "x", x, inner, regularizer=pull, estimator=estimator, optimizer=partial(SGD, lr=0.1, maximize=maximize)
    )
    return mlopt.Problem(mlopt.Level("u", u, outer), level), pull


def without(problem: mlopt.Problem, pull: Pull) -> mlopt.Problem:
    """Return the problem with a regularizer that supplies nothing."""

    def bare(x: nn.Module, *, u: nn.Module) -> Tensor:
        return pull(x, u=u)

    return mlopt.Problem(problem["u"], attrs.evolve(problem["x"], regularizer=bare))


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("products", ["autograd", "forward"])
def test_the_hypergradient_is_that_of_autograd(products: str, maximize: bool) -> None:
    problem, pull = problem_of(mlopt.Dense(products=products, damping=0.1), maximize=maximize)
    expected = mlopt.hypergradient(without(problem, pull)).gradient["value"]
    assert pull.products == 0
    result = mlopt.hypergradient(problem)
    assert pull.products > SIZE
    assert distance(result.gradient["value"], expected) < 1e-12
    assert not any("supplies" in remark for remark in result.reports["x"].remarks)
    before = pull.evaluations
    mlopt.hypergradient(problem)
    assert pull.evaluations == before  # the product was verified, and its graph is not needed


def test_a_wrong_product_is_reported() -> None:
    problem, _ = problem_of(mlopt.Dense(), factor=1.1)
    with pytest.warns(mlopt.TrustWarning):
        report = mlopt.hypergradient(problem).reports["x"]
    assert any("the product that the regularizer of level 'x' supplies differs" in r for r in report.remarks)


def test_a_product_of_other_shapes_is_refused() -> None:
    problem, pull = problem_of(mlopt.Dense())
    pull.product = lambda direction, wanted: {level: [torch.zeros(1)] for level in wanted}  # type: ignore[method-assign]
    with pytest.raises(mlopt.ProblemError, match=r"regularizer of level 'x' does not have the shapes of .* level 'x'"):
        mlopt.hypergradient(problem)
