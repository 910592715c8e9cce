"""One solve of the stationarity conditions of a level and of the levels inside it: closed forms, and its products."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from core_cases import distance, drawn, gradient_of, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD

import mlopt
from mlopt.testing import SHAPES, quadratic

NESTED = sorted(shape for shape in SHAPES if "nested" in shape)
#: The innermost level, by shape and depth of the nest.
DEPTHS = ("two", "nested", "nested_twice")


def joint(**options: float) -> mlopt.MINRES:
    return mlopt.MINRES(**({"iterations": 500, "rtol": 1e-13, "joint": True} | options))


@pytest.mark.parametrize("shape", NESTED)
@drawn(4)
@given(seed=seeds, size=st.integers(1, 3), products=st.sampled_from(["autograd", "forward"]))
def test_the_hypergradient_is_the_closed_form(shape: str, seed: int, size: int, products: str) -> None:
    case = quadratic(shape, joint(products=products), seed=seed, size=size)
    result = mlopt.hypergradient(case.problem, seed=0)
    assert case.error(result.gradient) < 1e-8
    assert all(report.converged for report in result.reports.values())


@pytest.mark.parametrize("alone", ["x", "y", "z"])
def test_any_level_of_a_nest_may_be_the_only_joint_one(alone: str) -> None:
    estimators = {level: mlopt.Dense() for level in "xyz"} | {alone: joint()}
    case = quadratic("nested_twice", estimators, seed=2, size=2)
    assert case.error(mlopt.hypergradient(case.problem).gradient) < 1e-8


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_products_add_up_with_the_depth(depth: int) -> None:
    """In place of 3, 30 and 261 for conjugate gradients of three iterations."""
    case = quadratic(DEPTHS[depth], joint(iterations=3, rtol=0.0), size=5)
    reports = mlopt.hypergradient(case.problem).reports
    assert sum(report.products for report in reports.values()) == 3 * (depth + 1)


def test_at_equal_error_it_takes_far_fewer_products() -> None:
    totals = []
    for rule in (joint(rtol=1e-8), mlopt.ConjugateGradient(iterations=100, rtol=1e-8)):
        case = quadratic("nested_twice", rule, size=5)
        result = mlopt.hypergradient(case.problem)
        assert case.error(result.gradient) < 1e-7
        totals.append(sum(report.products for report in result.reports.values()))
    assert 20 * totals[0] < totals[1]


@pytest.mark.parametrize("options", [{"damping": 0.1}, {"warm_start": True}])
def test_options_of_the_eliminated_system_are_refused(options: dict[str, float]) -> None:
    case = quadratic("nested", joint(**options))
    with pytest.raises(mlopt.EstimatorError, match=r"level 'y': damping or warm_start next to joint=True"):
        mlopt.hypergradient(case.problem)


def test_its_indefinite_system_is_no_negative_curvature_of_the_level() -> None:
    report = mlopt.hypergradient(quadratic("nested", joint()).problem).reports["y"]
    assert report.curvature is None
    assert not report.remarks


class Pair(nn.Module):
    """Two tensors of variables, the second of which the optimiser below leaves where it is."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.moves, self.rests = (nn.Parameter(torch.randn(2, generator=generator)) for _ in range(2))


def resting(module: Pair) -> torch.optim.Optimizer:
    return SGD([{"params": [module.moves]}, {"params": [module.rests], "lr": 0.0}], lr=0.1)


@pytest.mark.parametrize("levels", [("y",), ("z",), ("y", "z")])
def test_variables_that_rest_take_no_part(levels: tuple[str, ...]) -> None:
    """Against dense solves that eliminate the level inside."""

    def z_loss(z: Pair, batch: Any, *, u: nn.Module, y: Pair) -> Tensor:
        return (
            (z.moves * z.rests + y.moves - u()).square().sum()
            + (z.moves - y.rests).exp().sum()
            + z.rests.square().sum()
        )

    def y_loss(y: Pair, batch: Any, *, u: nn.Module, z: Pair) -> Tensor:
        return (
            (y.moves + z.moves * y.rests).square().sum()
            + (y.rests - u() * z.rests).square().sum()
            + y.moves.pow(4).sum()
        )

    def u_loss(u: nn.Module, batch: Any, *, y: Pair) -> Tensor:
        return y.moves.cos().sum() + y.rests.sin().sum() + u().square().sum()

    def gradient(rule: mlopt.Estimator) -> Tensor:
        made = {name: Pair(k) for k, name in enumerate("yz")}
        optimizers = {name: resting(made[name]) if name in levels else partial(SGD, lr=0.1) for name in "yz"}
        problem = mlopt.Problem(
            mlopt.Level("u", mlopt.variables(torch.tensor([0.3, -0.7])), u_loss),
            mlopt.Level("y", made["y"], y_loss, optimizer=optimizers["y"], estimator=rule),
            mlopt.Level("z", made["z"], z_loss, optimizer=optimizers["z"], estimator=rule),
        )
        return gradient_of(problem)

    assert distance(gradient(joint()), gradient(mlopt.Dense())) < 1e-10
