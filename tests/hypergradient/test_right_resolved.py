"""Law 1 on problems that are not quadratic: differences of the outer value, with the inner problems solved again."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

import pytest
import torch
from core_cases import conjugate_gradient, distance, drawn, gradient_of, seeds
from hypothesis import assume, given
from torch import Tensor
from torch.func import grad, hessian

import mlopt
from mlopt.problem import Variables

SIZE = 2


class Quartic:
    """A nested trilevel problem of fourth powers and bilinear, trilinear and nonlinear couplings."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        self.a, self.b, self.c, self.d = (draw(SIZE, SIZE) / 2 for _ in range(4))
        self.e, self.x = draw(SIZE), draw(SIZE)
        self.y = self._solve_middle()

    def inner(self, z: Tensor, y: Tensor, x: Tensor) -> Tensor:
        pull = z @ (self.a @ y + torch.tanh(self.b @ x))
        return (z**4).sum() / 4 + z @ z - pull + (z * y).square().sum() / 5

    def middle(self, y: Tensor, x: Tensor, z: Tensor) -> Tensor:
        return (y**4).sum() / 4 + y @ y - y @ (self.c @ x) + (z - self.e).square().sum() / 2 + (x * y * z).sum() / 5

    def outer(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return torch.cos(y).sum() + (z + x).square().sum() + y @ self.d @ z

    def solve_inner(self, y: Tensor, x: Tensor) -> Tensor:
        """Return the limit of Newton's method; two more steps with a graph make it exact to the second derivative."""
        z = torch.zeros(SIZE)
        for _ in range(8):
            z = self._newton(z, y.detach(), x.detach()).detach()
        for _ in range(2):
            z = self._newton(z, y, x)
        return z

    def _newton(self, z: Tensor, y: Tensor, x: Tensor) -> Tensor:
        slope = z**3 + 2 * z - self.a @ y - torch.tanh(self.b @ x) + 0.4 * z * y**2
        return z - torch.linalg.solve(torch.diag(3 * z**2 + 2 + 0.4 * y**2), slope)

    def total_middle(self, y: Tensor, x: Tensor) -> Tensor:
        return self.middle(y, x, self.solve_inner(y, x))

    def _slope(self, y: Tensor, x: Tensor) -> Tensor:
        y = y.detach().requires_grad_()
        return torch.autograd.grad(self.total_middle(y, x), y)[0]

    def _solve_middle(self) -> Tensor:
        """Return the limit of Newton's method with a new Hessian every third step, since that is what costs time."""
        y = torch.zeros(SIZE)
        for _ in range(5):
            curvature = hessian(self.total_middle)(y, self.x)
            for _ in range(3):
                y = y - torch.linalg.solve(curvature, self._slope(y, self.x))
        self.curvature = curvature
        return y

    def solve_middle(self, x: Tensor) -> Tensor:
        y = self.y
        for _ in range(5):  # near x, each step of this chord method gains four digits
            y = y - torch.linalg.solve(self.curvature, self._slope(y, x))
        return y

    def total_outer(self, x: Tensor) -> Tensor:
        y = self.solve_middle(x)
        return self.outer(x, y, self.solve_inner(y, x))

    def gradient(self, step: float = 1e-4) -> Tensor:
        """Return central differences of the outer value, with every inner problem solved again."""
        moves = step * torch.eye(SIZE)
        values = [self.total_outer(self.x + m) - self.total_outer(self.x - m) for m in moves]
        return torch.stack(values) / (2 * step)

    def problem(self, estimator: mlopt.Estimator) -> mlopt.Problem:
        y = self.y

        def outer(x: Variables, batch: Any, *, y: Variables, z: Variables) -> Tensor:
            return self.outer(x(), y(), z())

        def middle(y: Variables, batch: Any, *, x: Variables, z: Variables) -> Tensor:
            return self.middle(y(), x(), z())

        def inner(z: Variables, batch: Any, *, x: Variables, y: Variables) -> Tensor:
            return self.inner(z(), y(), x())

        return mlopt.Problem(
            mlopt.Level("x", mlopt.variables(self.x), outer),
            mlopt.Level("y", mlopt.variables(y), middle, estimator=estimator),
            mlopt.Level("z", mlopt.variables(self.solve_inner(y, self.x).detach()), inner, estimator=estimator),
        )


Q = TypeVar("Q", bound=Quartic)


class Chained(Quartic):
    """The same with a second level inside the middle one that depends on the first, so that multipliers pass between them."""

    def last(self, w: Tensor, z: Tensor, y: Tensor) -> Tensor:
        return (w**4).sum() / 4 + w @ w - w @ (torch.sin(z) + y * z)

    def solve_last(self, z: Tensor, y: Tensor) -> Tensor:
        w = torch.zeros(SIZE)
        for k in range(10):
            # As for z: converge without a graph, then take two steps with one.
            pull = torch.sin(z) + y * z if k >= 8 else (torch.sin(z) + y * z).detach()
            w = (w if k >= 8 else w.detach()) - (w**3 + 2 * w - pull) / (3 * w**2 + 2)
        return w

    def total_middle(self, y: Tensor, x: Tensor) -> Tensor:
        z = self.solve_inner(y, x)
        return self.middle(y, x, z) + self._middle_of_last(self.solve_last(z, y), y)

    def _middle_of_last(self, w: Tensor, y: Tensor) -> Tensor:
        return (w - 1).square().sum() / 2 + (w * y**2).sum() / 10

    def total_outer(self, x: Tensor) -> Tensor:
        y = self.solve_middle(x)
        z = self.solve_inner(y, x)
        return self.outer(x, y, z) + self.solve_last(z, y).sum()

    def problem(self, estimator: mlopt.Estimator) -> mlopt.Problem:
        x, y, z = super().problem(estimator)
        last = self.solve_last(z.module.value, y.module.value).detach()

        def outer(x: Variables, batch: Any, *, y: Variables, z: Variables, w: Variables) -> Tensor:
            return self.outer(x(), y(), z()) + w().sum()

        def middle(y: Variables, batch: Any, *, x: Variables, z: Variables, w: Variables) -> Tensor:
            return self.middle(y(), x(), z()) + self._middle_of_last(w(), y())

        def inner(w: Variables, batch: Any, *, y: Variables, z: Variables) -> Tensor:
            return self.last(w(), z(), y())

        return mlopt.Problem(
            mlopt.Level("x", x.module, outer),
            mlopt.Level("y", y.module, middle, estimator=estimator),
            mlopt.Level("w", mlopt.variables(last), inner, estimator=estimator),
            z,
        )


def converged(kind: type[Q], seed: int) -> Q:
    """Return a problem whose middle level is solved."""
    problem = kind(seed)
    # For a few draws Newton's method from zero diverges, and there is no oracle.
    assume(grad(problem.total_middle)(problem.y, problem.x).norm() < 1e-10)
    return problem


@pytest.mark.parametrize("products", ["autograd", "forward"])
@drawn(2)
@given(seed=seeds)
def test_two_levels_inside_solved_again(products: str, seed: int) -> None:
    chained = converged(Chained, seed)
    problem = chained.problem(mlopt.Dense(products=products))
    assert problem.graph["y"].parts == ("w", "z")
    assert distance(gradient_of(problem), chained.gradient()) < 1e-6


@drawn(5)
@given(seed=seeds)
def test_a_nested_problem_solved_again(seed: int) -> None:
    quartic = converged(Quartic, seed)
    expected = quartic.gradient()
    estimators = {"dense": mlopt.Dense(), "forward": mlopt.Dense(products="forward"), "cg": conjugate_gradient()}
    for name, estimator in estimators.items():
        # The tolerance covers the oracle's own error: the square of its step, and rounding over it.
        assert distance(gradient_of(quartic.problem(estimator)), expected) < 1e-6, name


@drawn(4)
@given(seed=seeds)
def test_differences_on_a_nested_problem_solved_again(seed: int) -> None:
    quartic = converged(Quartic, seed)
    estimator = mlopt.Dense(products="finite_difference")
    assert distance(gradient_of(quartic.problem(estimator)), quartic.gradient()) < 1e-6


@drawn(10)
@given(seed=seeds)
def test_the_total_gradient_of_the_middle_level(seed: int) -> None:
    """Off the middle level's solution, a zero gradient does not hide a wrong multiplier."""
    quartic = converged(Quartic, seed)
    problem = quartic.problem(mlopt.Dense())
    y = problem["y"].module.value.detach() + 0.3
    problem["y"].module.value.data.copy_(y)
    problem["z"].module.value.data.copy_(quartic.solve_inner(y, quartic.x).detach())
    expected = grad(quartic.total_middle)(y, quartic.x)
    assert distance(gradient_of(problem, level="y"), expected) < 1e-8


@pytest.mark.parametrize("products", ["autograd", "forward"])
def test_the_oracle_detects_an_error(products: str) -> None:
    quartic = Quartic(3)
    estimator = mlopt.Dense(products=products)
    problem = quartic.problem(estimator)
    problem["z"].module.value.data.add_(0.5)
    assert distance(gradient_of(problem), quartic.gradient()) > 1e-2
