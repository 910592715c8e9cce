"""A loss that leaves a level without a derivative, moves variables, or cannot be replayed is reported or refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from core_cases import gradient_of
from torch import Tensor, nn
from torch.optim import SGD

import mlopt

A = torch.tensor([[2.0, -1.0], [0.5, 1.0]], dtype=torch.float64)
U = torch.tensor([0.8, -0.6], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, -1.5], dtype=torch.float64)
PRODUCTS = ("autograd", "forward", "finite_difference")
ESTIMATORS = {
    **{products: mlopt.ConjugateGradient(iterations=4, products=products) for products in PRODUCTS},
    "unrolled": mlopt.Unrolled(steps=2),
    "value function": mlopt.ValueFunction(),
}
STEP = partial(SGD, lr=0.1)


def outer_loss(u: nn.Module, batch: Any, *, y: nn.Module) -> Tensor:
    return WEIGHTS @ y()


def inner_loss(y: nn.Module, batch: Any, *, u: nn.Module) -> Tensor:
    return (y() - A @ u()).square().sum() / 2


def build(
    inner: Callable[..., Any] = inner_loss,
    *,
    outer: Callable[..., Any] = outer_loss,
    estimator: mlopt.Estimator | None = None,
    module: nn.Module | None = None,
    u: nn.Module | None = None,
    **options: Any,
) -> mlopt.Problem:
    rule = mlopt.Dense() if estimator is None else estimator
    y = mlopt.variables(A @ U) if module is None else module
    return mlopt.Problem(
        mlopt.Level("u", u or mlopt.variables(U), outer, optimizer=STEP),
        mlopt.Level("y", y, inner, estimator=rule, optimizer=STEP, **options),
    )


def remarks_of(problem: mlopt.Problem) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mlopt.hypergradient(problem)
    return [str(warning.message) for warning in caught if warning.category is mlopt.TrustWarning]


USES: dict[str, Callable[[mlopt.Problem], Any]] = {
    "hypergradient": mlopt.hypergradient,
    "solve": partial(mlopt.solve, steps=1, progress=False),
}


# References without a derivative


def without_grad(u: nn.Module) -> Tensor:
    with torch.no_grad():
        return u() * 1


CUTS: dict[str, Callable[[nn.Module], Tensor]] = {
    "detach": lambda u: u().detach(),
    "tolist": lambda u: torch.tensor(u().tolist(), dtype=torch.float64),
    "no_grad": without_grad,
    "unused": lambda u: U,
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("cut", CUTS)
def test_a_reference_without_a_derivative_is_reported(cut: str, estimator: str) -> None:
    def inner(y: nn.Module, batch: Any, *, u: nn.Module) -> Tensor:
        return (y() - A @ CUTS[cut](u)).square().sum() / 2

    with pytest.warns(mlopt.TrustWarning, match="loss of level 'y' names 'u' and has no derivative.*without detach"):
        result = mlopt.hypergradient(build(inner, estimator=ESTIMATORS[estimator]))
    assert result.reports["y"].doubtful


def test_solve_and_diagnose_report_it_too() -> None:
    def inner(y: nn.Module, batch: Any, *, u: nn.Module) -> Tensor:
        return (y() - A @ u().detach()).square().sum() / 2

    with pytest.warns(mlopt.TrustWarning, match="names 'u' and has no derivative"):
        mlopt.solve(build(inner), steps=1, progress=False)
    assert not mlopt.diagnose(build(inner)).safe


def test_an_outer_loss_that_detaches_a_solution_is_reported() -> None:
    def outer(u: nn.Module, batch: Any, *, y: nn.Module) -> Tensor:
        return WEIGHTS @ y().detach() + u().square().sum()

    (sentence,) = remarks_of(build(outer=outer))
    assert "loss of level 'u' names 'y' and has no derivative" in sentence


def test_a_reference_that_a_later_batch_uses_is_not_reported_again() -> None:
    def inner(y: nn.Module, batch: Any, *, u: nn.Module) -> Tensor:
        return (y() - (A @ u() if batch else A @ U)).square().sum() / 2

    problem = build(inner)
    unused, used = {"y": torch.tensor(0)}, {"y": torch.tensor(1)}
    with pytest.warns(mlopt.TrustWarning, match="no derivative"):
        mlopt.hypergradient(problem, unused)
    for batches in (used, used, unused, unused, unused, unused):
        mlopt.hypergradient(problem, batches)


@pytest.mark.parametrize("use", USES)
def test_an_outermost_level_that_nothing_depends_on_is_refused(use: str) -> None:
    def forgets(y: nn.Module, batch: Any) -> Tensor:
        return (y() - A @ U).square().sum() / 2

    with pytest.raises(mlopt.ProblemError, match=r"nothing depends on the variables of level 'u'.*make 'u' a keyword"):
        USES[use](build(forgets, outer=lambda u, batch, *, y: WEIGHTS @ y()))


@pytest.mark.parametrize("use", USES)
def test_an_outermost_level_with_an_objective_of_its_own_needs_no_reference(use: str) -> None:
    def outer(u: nn.Module, batch: Any, *, y: nn.Module) -> Tensor:
        return (u() - y()).square().sum()

    USES[use](build(lambda y, batch: (y() - A @ U).square().sum(), outer=outer))


def test_the_outer_variables_in_the_inner_batch_are_refused() -> None:
    u = mlopt.variables(U)
    problem = build(
        lambda y, batch: (y() - A @ batch[0]).square().sum(),
        outer=lambda u, batch, *, y: WEIGHTS @ y() + u().sum(),
        u=u,
        data=[[u.value]],
    )
    with pytest.raises(
        mlopt.ProblemError, match="loss of level 'y' depends on 'value' of level 'u' and does not declare"
    ):
        mlopt.hypergradient(problem)


# Evaluations that write variables


class Clamped(mlopt.Variables):
    def forward(self) -> Tensor:
        self.value.data.clamp_(-0.3, 0.3)
        return self.value


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("products", PRODUCTS)
def test_a_loss_that_writes_variables_is_refused_and_moves_nothing(products: str, use: str) -> None:
    module = Clamped(A @ U)
    problem = build(module=module, estimator=ESTIMATORS[products])
    with pytest.raises(mlopt.ProblemError, match=r"writes to variables of level 'y'.*without writing it"):
        USES[use](problem)
    assert torch.equal(module.value, A @ U)


@pytest.mark.parametrize("later", [False, True])
def test_an_embedding_that_renormalises_its_weight_is_refused(later: bool) -> None:
    """Also if its weight is small at the first evaluation, where nothing moves."""
    embedding = nn.Embedding(3, 2, max_norm=0.5, dtype=torch.float64)
    before = embedding.weight.detach().clone().fill_(1.0)
    embedding.weight.data.copy_(before * (0.1 if later else 1.0))

    def inner(y: nn.Module, batch: Any, *, u: nn.Module) -> Tensor:
        return (y(torch.arange(2)) - u()).square().sum()

    problem = build(inner, outer=lambda u, batch, *, y: y.weight.sum(), module=embedding)
    if later:
        mlopt.hypergradient(problem)
        embedding.weight.data.copy_(before)
        problem.workspace.evaluations.update(dict.fromkeys(problem.workspace.evaluations, 7))
    with pytest.raises(mlopt.ProblemError, match=r"loss of level 'y' writes to variables of level 'y'.*max_norm"):
        mlopt.hypergradient(problem)
    assert torch.equal(embedding.weight, before)


def test_a_variable_that_is_nan_is_not_taken_for_one_that_was_written() -> None:
    with pytest.raises(mlopt.NonFiniteError):
        mlopt.hypergradient(build(module=mlopt.variables(A @ U * torch.nan)))


# Evaluations that cannot be repeated


@pytest.mark.parametrize("estimator", ["autograd", "finite_difference"])
def test_a_loss_that_counts_its_calls_is_reported(estimator: str) -> None:
    count = iter(range(1000))

    def inner(y: nn.Module, batch: Any, *, u: nn.Module) -> Tensor:
        return inner_loss(y, batch, u=u) + 0.1 * next(count) * y().square().sum()

    remarks = remarks_of(build(inner, estimator=ESTIMATORS[estimator]))
    assert any("at the same variables, batch and random numbers" in remark for remark in remarks)


def test_a_loss_that_draws_from_the_global_generators_is_not_reported() -> None:
    def inner(y: nn.Module, batch: Any, *, u: nn.Module) -> Tensor:
        return inner_loss(y, batch, u=u) + torch.rand((), dtype=torch.float64) * y().square().sum()

    assert remarks_of(build(inner)) == []


@pytest.mark.parametrize("estimator", ["autograd", "forward", "finite_difference", "unrolled"])
@pytest.mark.parametrize("use", ["hypergradient", "solve", "given"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_batch_that_one_evaluation_uses_up_is_refused(nested: bool, use: str, estimator: str) -> None:
    def inner(y: nn.Module, batch: Any, *, u: nn.Module) -> Tensor:
        return sum(inner_loss(y, None, u=u) * x for x in (batch["x"] if nested else batch)) + 0 * y().sum()

    batch = ({"x": map(float, (1, 1))} if nested else (float(x) for x in (1, 1)),)
    problem = build(inner, estimator=ESTIMATORS[estimator], data=list(batch))
    with pytest.raises(mlopt.ProblemError, match=r"level 'y': its batch holds a (generator|map).*give a list"):
        mlopt.hypergradient(problem, {"y": batch[0]}) if use == "given" else USES[use](problem)


# Data that are one batch


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ((torch.ones(2), torch.ones(2)), r"data is a tuple of 2 tensors.*give \[\(X, Y\)\]"),
        ({"x": torch.ones(2)}, r"data is a dict, whose keys would be batches; give \[batch\]"),
    ],
)
def test_data_that_are_one_batch_are_refused(data: Any, sentence: str) -> None:
    with pytest.raises(mlopt.ProblemError, match=sentence):
        build(data=data)


def test_a_list_of_tensors_is_a_list_of_batches() -> None:
    problem = build(
        lambda y, batch, *, u: (y() - A @ u() * batch).square().sum(), data=[torch.ones(()), torch.ones(())]
    )
    torch.testing.assert_close(gradient_of(problem), A.T @ WEIGHTS)
