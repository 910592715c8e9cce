"""K-FAC where it does not apply: every refusal names the level, the reason and a remedy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import mlopt
from mlopt.diagnosis import estimate_requirements
from mlopt.testing import logistic_regression

KFAC = mlopt.KFACPreconditioner()
RULE = mlopt.ConjugateGradient(preconditioner=KFAC)


class _OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * slope


def _once(x: nn.Module, inputs: Tensor) -> Tensor:
    return _OnceDifferentiable.apply(x(inputs)).square().mean()


def _absent(x: nn.Module, inputs: Tensor) -> Tensor:
    return (inputs @ x.weight.T).square().mean()


def _fed_back(x: nn.Module, inputs: Tensor) -> Tensor:
    return x(x(inputs)).square().mean()


def _squared(x: nn.Module, inputs: Tensor) -> Tensor:
    return x(inputs).square().mean()


def _cusp(x: nn.Module, inputs: Tensor) -> Tensor:
    return (x(inputs) * 0.0).abs().pow(1.5).sum() + x.weight.square().sum()


def _problem(loss: Any, module: nn.Module, products: str = "autograd", width: int = 3) -> mlopt.Problem:
    torch.manual_seed(0)
    inputs = torch.randn(5, width)

    def inner(x: nn.Module, batch: Any, *, outer: nn.Module) -> Tensor:
        return loss(x, inputs) + (outer() * x.weight.mean()).sum()

    def outer(u: nn.Module, batch: Any, *, inner: nn.Module) -> Tensor:
        return inner.weight.sum()

    rule = mlopt.ConjugateGradient(preconditioner=KFAC, products=products)
    return mlopt.Problem(
        mlopt.Level("outer", mlopt.variables(torch.ones(2)), outer),
        mlopt.Level("inner", module.double(), inner, estimator=rule),
    )


@pytest.mark.parametrize(
    ("loss", "module", "products", "error", "sentence"),
    [
        (_absent, nn.Linear(3, 3), "autograd", mlopt.EstimatorError, "never calls it with gradients; call the module"),
        (_fed_back, nn.Linear(3, 3), "autograd", mlopt.EstimatorError, "KFACPreconditioner: the loss feeds outputs of"),
        (
            _squared,
            nn.Linear(3, 257),
            "autograd",
            mlopt.EstimatorError,
            "have 257 columns, and .* takes at most 256; use",
        ),
        (_once, nn.Linear(3, 3), "finite_difference", mlopt.SecondDerivativeError, "by the outputs of its module, and"),
    ],
)
def test_losses_that_it_does_not_fit(loss, module, products, error, sentence):
    with pytest.raises(error, match=sentence) as raised:
        mlopt.hypergradient(_problem(loss, module, products))
    assert "use mlopt.linear.NystromPreconditioner()" in str(raised.value)


def test_the_most_columns_are_accepted():
    report = mlopt.hypergradient(_problem(_squared, nn.Linear(3, 256))).reports["inner"]
    assert report.products > 0


def test_second_derivative_that_is_not_finite():
    with pytest.raises(
        mlopt.NonFiniteError, match="level 'inner': KFACPreconditioner: the second derivative of the loss"
    ):
        mlopt.hypergradient(_problem(_cusp, nn.Linear(3, 3)))


def test_several_processes():
    point: Any = SimpleNamespace(problem=SimpleNamespace(ranks=SimpleNamespace(several=True)))
    with pytest.raises(mlopt.EstimatorError, match=r"level 'inner': .* works on one process; use mlopt.linear.Nystrom"):
        KFAC.at(point, "inner")


def test_sharded_variables():
    assert (
        "computes with the entries of whole vectors"
        in mlopt.ConjugateGradient(preconditioner=KFAC, products="finite_difference").needs_whole
    )


def test_stacked_modules():
    def support(net: nn.Module, batch: Any, *, meta: nn.Module) -> Tensor:
        return (net(batch).square().sum() + (net.weight - meta.weight).square().sum()) / 2

    def query(meta: nn.Module, batch: Any, *, net: nn.Module) -> Tensor:
        return net(batch).sum()

    start, rows = nn.Linear(3, 1), torch.randn(2, 5, 3)
    problem = mlopt.Problem(
        mlopt.Level("meta", start, mlopt.over_tasks(query), data=[rows]),
        mlopt.Level("net", mlopt.stacked(start, 2), mlopt.over_tasks(support), data=[rows], estimator=RULE),
    )
    with pytest.raises(mlopt.EstimatorError, match=r"outputs of its Stacked.*use mlopt.linear.NystromPreconditioner"):
        mlopt.hypergradient(problem)


def test_bare_solver():
    solver = mlopt.linear.ConjugateGradient(preconditioner=KFAC)
    with pytest.raises(mlopt.EstimatorError, match="pass it to the estimator"):
        solver.solve(lambda v: v, (torch.ones(2),))


def test_memory_is_not_estimated():
    assert KFAC.cost(1_000) is None
    requirements = estimate_requirements(logistic_regression(RULE).problem)
    assert requirements.unknown == ("regression",)
    assert requirements.levels["regression"].pullback is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"draws": 0}, r"draws=0; it must be a whole number >= 1, or None"),
        ({"draws": 1.5}, r"draws=1.5; it must be a whole number >= 1, or None"),
        ({"seed": -1}, r"seed=-1; it must be a whole number >= 0"),
    ],
)
def test_arguments_are_checked(options, sentence):
    with pytest.raises(mlopt.ArgumentError, match=sentence):
        mlopt.KFACPreconditioner(**options)
