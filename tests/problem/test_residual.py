"""Levels that a residual defines: its forms, its checks, and the problems that they are a part of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from core_cases import gradient_of
from torch import Tensor, nn

import mlopt
from mlopt import Level, Problem


def problem(residual: Callable[..., Any], module: nn.Module | None = None, **options: Any) -> Problem:
    given = {"estimator": mlopt.GMRES()} | options
    return Problem(
        Level("u", mlopt.variables(torch.ones(2)), lambda u, batch, *, x: sum(p.sum() for p in x.parameters())),
        Level("x", module or mlopt.variables(torch.ones(2)), residual=residual, **given),
    )


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (
            lambda x, u: torch.stack([x, x]),
            r"has shape \(2, 2\) for 'value'; it must have that of the variable, \(2,\)",
        ),
        (lambda x, u: (x - u).float(), "is of torch.float32 for 'value'; it must be of torch.float64, as the variable"),
        (
            lambda x, u: [x - u, x],
            r"returned 2 tensors; it must return one for each of the 1 variables \(value: \(2,\)\)",
        ),
        (lambda x, u: {"other": x - u}, "returned a mapping with 'other'; it must hold a tensor for each variable"),
        (lambda x, u: 3.0, "is a float; it must be a tensor, a sequence of tensors, or a mapping by parameter name"),
        (lambda x, u: [1.0], "is a list; it must be a tensor, a sequence of tensors, or a mapping"),
        (lambda x, u: (x - u).detach(), "does not depend on variables.*create_graph=True"),
    ],
    ids=["shape", "dtype", "count", "name", "number", "numbers", "detached"],
)
def test_residuals_of_the_wrong_form_are_refused(value: Callable[[Tensor, Tensor], Any], sentence: str) -> None:
    with pytest.raises(mlopt.ProblemError, match=f"the residual of level 'x' {sentence}"):
        mlopt.hypergradient(problem(lambda x, batch, *, u: value(x(), u())))


def test_a_residual_that_uses_another_level_must_declare_it() -> None:
    other = mlopt.variables(torch.ones(2))
    with pytest.raises(
        mlopt.ProblemError, match="the residual of level 'x' depends on 'value' of level 'u' and does not declare"
    ):
        mlopt.hypergradient(
            Problem(
                Level("u", other, lambda u, batch, *, x, y: x().sum() + y().sum()),
                Level(
                    "x",
                    mlopt.variables(torch.ones(2)),
                    residual=lambda x, batch, *, y: x() - y() + other(),
                    estimator=mlopt.Dense(),
                ),
                Level(
                    "y",
                    mlopt.variables(torch.ones(2)),
                    lambda y, batch, *, u: (y() - u()).square().sum(),
                    estimator=mlopt.Dense(),
                ),
            )
        )


def test_a_reference_without_a_derivative_is_reported() -> None:
    with pytest.warns(
        mlopt.TrustWarning, match="the residual of level 'x' names 'u' and has no derivative with respect to it"
    ):
        mlopt.hypergradient(problem(lambda x, batch, *, u: x() - u().detach()))


def test_a_residual_that_writes_is_refused() -> None:
    def writes(x: Any, batch: Any, *, u: Any) -> Tensor:
        x.value.data.clamp_(max=0.5)
        return x() - u()

    with pytest.raises(mlopt.ProblemError, match="the residual of level 'x' writes to variables of level 'x'"):
        mlopt.hypergradient(problem(writes))

    def spoils(x: Any, batch: Any, *, u: Any) -> Tensor:
        batch.mul_(2.0)
        return x() - u() * batch

    with pytest.raises(mlopt.ProblemError, match="the residual of level 'x' changed a tensor of its batch in place"):
        mlopt.hypergradient(problem(spoils, data=[torch.ones(2)]))


def test_a_residual_that_differs_between_two_evaluations_is_reported() -> None:
    calls = [0]

    def counts(x: Any, batch: Any, *, u: Any) -> Tensor:
        calls[0] += 1
        return x() * (1 + 0.01 * calls[0]) - u()

    with pytest.warns(mlopt.TrustWarning, match="level 'x'.*at the same variables, batch and random numbers"):
        mlopt.hypergradient(problem(counts))


def test_random_numbers_are_the_same_in_all_evaluations_of_a_pullback() -> None:
    """A residual with dropout: the solution of the system is that of one mask."""
    torch.manual_seed(0)

    def masked(x: Any, batch: Any, *, u: Any) -> Tensor:
        mask = torch.nn.functional.dropout(torch.ones(2), 0.5) + 1.0
        return mask * x() + 0.5 * x().flip(0) - u()

    for products in ("autograd", "forward", "finite_difference"):
        gradient = gradient_of(problem(masked, estimator=mlopt.GMRES(products=products)), seed=5)
        choices = [
            torch.linalg.solve(torch.diag(torch.tensor(mask)) + 0.5 * torch.eye(2).flip(0), torch.ones(2))
            for mask in ([1.0, 1.0], [1.0, 3.0], [3.0, 1.0], [3.0, 3.0])
        ]
        assert min(float((gradient - choice).norm()) for choice in choices) < 1e-8


def level(name: str = "x", **options: Any) -> Level:
    given = {"residual": lambda x, batch, *, u: x() - u(), "estimator": mlopt.GMRES()} | options
    return Level(name, mlopt.variables(torch.ones(2)), **given)


def outer(*names: str) -> Level:
    if len(names) == 1:
        return Level("u", mlopt.variables(torch.ones(2)), lambda u, batch, *, x: x().sum())
    return Level("u", mlopt.variables(torch.ones(2)), lambda u, batch, *, x, y: x().sum() + y().sum())


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: level(loss=lambda x, batch: x().sum()), "level 'x': give it either a loss or a residual; it has both"),
        (lambda: level(residual=None), "level 'x': give it either a loss or a residual; it has neither"),
        (lambda: level(regularizer=lambda x: x().sum()), "level 'x': regularizer=.* cannot be combined with residual"),
        (lambda: level(response=mlopt.RealSteps(steps=2)), "level 'x': response=.* cannot be combined with residual"),
        (lambda: level(residual=lambda x: x()), "the residual of level 'x' takes 1 required positional parameters"),
        (lambda: level(solver=lambda x, batch, *, v: None), "the solver of level 'x' refers to 'v', and its residual does not"),
        (
            lambda: Problem(outer("x"), level(residual=lambda x, batch, *, u=None: x())),
            "the residual of level 'x' has a parameter 'u' with a default",
        ),
        (lambda: Problem(outer("x"), level(estimator=None)), "level 'x': estimator=None, and its solution depends on 'u'"),
        (
            lambda: Problem(level(residual=lambda x, batch: x())),
            "level 'x': it has a residual, and the outermost level needs a loss",
        ),
        (
            lambda: Problem(
                outer("x", "y"),
                level(residual=lambda x, batch, *, u, y: x() - u() - y()),
                level("y", residual=lambda y, batch, *, x: y() - x()),
            ),
            "level 'x': its residual depends on the solutions of 'y' inside it",
        ),
        (
            lambda: Problem(
                outer("x", "y"),
                level(residual=None, loss=lambda x, batch, *, u, y: (x() - u() * y()).square().sum(), estimator=mlopt.Dense()),
                level("y", residual=lambda y, batch, *, x: y() - x()),
            ),
            "level 'x': cotangents are pulled back through it, and 'y' with its residual is solved inside it",
        ),
    ],
)  # fmt: skip
def test_levels_and_problems_that_cannot_be_are_refused(build: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(mlopt.ProblemError, match=sentence):
        build()


def test_a_level_with_a_residual_has_no_hypergradient() -> None:
    with pytest.raises(
        mlopt.ProblemError, match="level 'x': it has a residual and no loss, so it has no hypergradient"
    ):
        mlopt.hypergradient(Problem(outer("x"), level()), level="x")


def test_a_problem_prints_its_conditions() -> None:
    assert str(Problem(outer("x"), level(steps=3))).splitlines()[1] == (
        "└── x  2 variables, refers to u, a condition, 3 steps a solve, GMRES(iterations=30) with autograd products"
    )


def test_frozen_and_unused_variables_are_legal() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.Parameter(torch.full((2,), 2.0), requires_grad=False)
            self.x = nn.Parameter(torch.ones(2))

        def forward(self) -> Tensor:
            return self.x

    gradient = gradient_of(problem(lambda x, batch, *, u: x.frozen * x() - u(), Wide()))
    torch.testing.assert_close(gradient, torch.full((2,), 0.5))
