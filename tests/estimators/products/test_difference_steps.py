"""Steps of differences for variables of every size, against closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core_cases import distance, flat
from torch import Tensor, nn

import mlopt

WEIGHTS = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
#: Errors of central differences at the step of each dtype.
TOLERANCE = {torch.float32: 3e-3, torch.float64: 1e-6}


def scaled(size: float, dtype: torch.dtype, start: Tensor, estimator: mlopt.Estimator) -> tuple[float, mlopt.Report]:
    """Return the error of dy/du where sum_i c_i size^2 (exp(y_i / size) - y_i / size exp(u_i)) has the minimum y = size u."""
    weights, curvature = WEIGHTS.to(dtype), torch.arange(1, 4, dtype=dtype)

    def inner(module: nn.Module, batch: Any, *, u: nn.Module) -> Tensor:
        y = module() / size
        return size**2 * (curvature * (y.exp() - y * u().exp())).sum()

    def outer(module: nn.Module, batch: Any, *, y: nn.Module) -> Tensor:
        return (weights * y()).sum()

    problem = mlopt.Problem(
        mlopt.Level("u", mlopt.variables(start.to(dtype)), outer),
        mlopt.Level("y", mlopt.variables((size * start).to(dtype)), inner, estimator=estimator),
    )
    mlopt.hypergradient(problem)
    result = mlopt.hypergradient(problem)
    return distance(flat(result.gradient), size * weights), result.reports["y"]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("start", "size"),
    [
        *(((0.7, 1.0, -0.7), size) for size in (1e-7, 1e-5, 1e-3, 0.1, 1.0, 1e3)),
        *(((0.0, 0.0, 0.0), size) for size in (1e-7, 1e-5, 1e-3, 0.1, 1.0)),
    ],
)
def test_variables_of_every_size(start: tuple[float, ...], size: float, dtype: torch.dtype) -> None:
    rtol = 1e-5 if dtype == torch.float32 else 1e-9
    rule = mlopt.ConjugateGradient(iterations=50, rtol=rtol, products="finite_difference")
    error, report = scaled(size, dtype, torch.tensor(start), rule)
    assert error < TOLERANCE[dtype]
    assert not any("disagree" in remark for remark in report.remarks)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [1e-5, 1e-3, 1.0])
def test_the_value_function_with_variables_of_every_size(size: float, dtype: torch.dtype) -> None:
    """Penalised solutions stay within a distance that suits the variables."""
    start = torch.tensor([0.7, 1.0, -0.7])
    error, _ = scaled(size, dtype, start, mlopt.ValueFunction(steps=300))
    assert error < 10 * TOLERANCE[dtype]


class Pair(nn.Module):
    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", [(1e-3, 1e3), (1.0, 1e3), (1e-5, 1.0), (1e-7, 1e3), (1e-7, 1e-3)])
@pytest.mark.parametrize("solver", [mlopt.linear.Dense(), mlopt.linear.Identity()])
def test_tensors_of_different_sizes_in_a_block(
    solver: mlopt.linear.LinearSolver, sizes: tuple[float, float], dtype: torch.dtype
) -> None:
    """Each of exp(p) - p exp(u) with p = a / size and p = b / size; a step along both would be too long for one of them."""
    u = torch.tensor([0.7, 1.0, -0.7], dtype=dtype)
    weights = WEIGHTS.to(dtype)

    def inner(module: nn.Module, batch: Any, *, u: nn.Module) -> Tensor:
        p, q = module.a / sizes[0], module.b / sizes[1]
        return (p.exp() - p * u().exp()).sum() + (q.exp() - q * (2 * u()).exp()).sum()

    def outer(module: nn.Module, batch: Any, *, y: nn.Module) -> Tensor:
        return (weights * y.a / sizes[0]).sum() + (weights * y.b / sizes[1]).sum()

    def gradient(products: str) -> Tensor:
        rule = mlopt.estimators.LinearSolve(solver=solver, products=products)
        problem = mlopt.Problem(
            mlopt.Level("u", mlopt.variables(u.clone()), outer),
            mlopt.Level("y", Pair(sizes[0] * u, sizes[1] * 2 * u), inner, estimator=rule),
        )
        return flat(mlopt.hypergradient(problem).gradient)

    expected = 3 * weights if isinstance(solver, mlopt.linear.Dense) else gradient("autograd")
    assert distance(gradient("finite_difference"), expected) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_tensors_of_different_sizes_move_together_where_a_shorter_step_suits_them(dtype: torch.dtype) -> None:
    """At the usual step, the small tensor would move far; groups would cost a difference each."""
    u = torch.tensor([0.7, 1.0, -0.7], dtype=dtype)
    seen: list[int] = []

    def inner(module: nn.Module, batch: Any, *, u: nn.Module) -> Tensor:
        seen.append(1)
        p, q = module.a / 0.4, module.b / 40
        return (u() * (p.exp() + q.exp())).sum()

    def outer(module: nn.Module, batch: Any, *, y: nn.Module) -> Tensor:
        return (WEIGHTS.to(dtype) * (y.a / 0.4 + y.b / 40)).sum()

    problem = mlopt.Problem(
        mlopt.Level("u", mlopt.variables(u.clone()), outer),
        mlopt.Level("y", Pair(0.4 * u, 80 * u), inner, estimator=mlopt.FiniteDifference()),
    )
    mlopt.hypergradient(problem)
    seen.clear()
    gradient = flat(mlopt.hypergradient(problem).gradient)
    expected = -WEIGHTS.to(dtype) * (u.exp() / 0.4**2 + (2 * u).exp() / 40**2)
    assert distance(gradient, expected) < TOLERANCE[dtype]
    assert len(seen) == 2


def test_a_network_with_zero_biases_moves_by_one_step() -> None:
    """Its tensors have very different sizes, but one difference suits them all, so the cost stays at two gradients."""
    module = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    for layer in (module[0], module[2]):
        layer.bias.data.zero_()
    inputs = torch.randn(8, 4, dtype=torch.float64)
    seen: list[int] = []

    def inner(module: nn.Module, batch: Any, *, u: nn.Module) -> Tensor:
        seen.append(1)
        return (u() * module(inputs).squeeze(1).square()).sum() + sum(p.square().sum() for p in module.parameters())

    def outer(module: nn.Module, batch: Any, *, y: nn.Module) -> Tensor:
        return y(inputs).sum()

    gradients = []
    for products in ("finite_difference", "autograd"):
        problem = mlopt.Problem(
            mlopt.Level("u", mlopt.variables(torch.ones(8, dtype=torch.float64)), outer),
            mlopt.Level("y", module, inner, estimator=mlopt.Identity(products=products)),
        )
        mlopt.hypergradient(problem)
        seen.clear()
        gradients.append(flat(mlopt.hypergradient(problem).gradient))
        assert len(seen) == (2 if products == "finite_difference" else 1)
    assert distance(*gradients) < 1e-8


def test_steps_are_measured_once_and_kept_with_a_run() -> None:
    """A run that is resumed takes the same steps as one that was not interrupted."""
    problem = mlopt.Problem(
        mlopt.Level("u", mlopt.variables(torch.ones(3)), lambda u, batch, *, y: y().sum()),
        mlopt.Level("y", mlopt.variables(1e-5 * torch.ones(3)), _steep, estimator=mlopt.FiniteDifference()),
    )
    mlopt.hypergradient(problem)
    state = problem.workspace.state_dict()
    assert 0 < state["lengths"]["y/loss/y/by/u"][0][0][1] < 1e-2
    other = mlopt.problem.Workspace()
    other.load_state_dict(state)
    assert other.lengths == problem.workspace.lengths


def _steep(module: nn.Module, batch: Any, *, u: nn.Module) -> Tensor:
    return ((module() / 1e-5).exp() * u()).sum()
