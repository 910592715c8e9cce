"""Conjugate gradients with a history, in runs: the laws of a warm start, and hypergradients within the tolerance."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from core_cases import distance, flat, point_of
from torch import Tensor, nn

import mlopt
from mlopt.hypergradient import at_solutions, partial_derivatives, total_derivative
from mlopt.problem import Carryover, Objective, Point
from mlopt.tensors import flatten, zeros_like
from mlopt.testing import quadratic

RULE = mlopt.ConjugateGradient(iterations=60, rtol=1e-3, history=20)
SIZE = 24


def cleaning(estimator: mlopt.Estimator, *, optimizer: Any = None, dtype: torch.dtype = torch.float64) -> mlopt.Problem:
    """Return ridge regression with a weight for each of 40 samples, learned on 20 others."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, SIZE, generator=generator) * 3 ** -torch.linspace(0, 2, SIZE)
    targets = (inputs @ torch.randn(SIZE, generator=generator) + torch.randn(60, generator=generator)).to(dtype)
    inputs = inputs.to(dtype)

    def training(model: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
        errors = (inputs[:40] @ model() - targets[:40]).square()
        return (weights().sigmoid() * errors).mean() + 1e-2 * model().square().sum()

    def validation(weights: nn.Module, batch: Any, *, model: nn.Module) -> Tensor:
        return (inputs[40:] @ model() - targets[40:]).square().mean()

    return mlopt.Problem(
        mlopt.Level(
            "weights",
            mlopt.variables(torch.zeros(40, dtype=dtype)),
            validation,
            optimizer=partial(torch.optim.Adam, lr=1e-2),
        ),
        mlopt.Level(
            "model",
            mlopt.variables(torch.zeros(SIZE, dtype=dtype)),
            training,
            optimizer=optimizer or partial(torch.optim.SGD, lr=0.2),
            estimator=estimator,
        ),
    )


class Watch(mlopt.Callback):
    """Compares every hypergradient of a run with that of a dense solve at the same point."""

    def __init__(self, estimator: mlopt.Estimator, problem: mlopt.Problem, **options: Any) -> None:
        self.estimator, self.problem, self.options = estimator, problem, options
        self.errors: list[float] = []
        self.products: list[int] = []
        self.residuals: list[float] = []

    def on_step_begin(self, run: Any) -> None:
        self.before = {level.name: [p.detach().clone() for p in level.parameters] for level in self.problem}

    def on_step_end(self, run: Any) -> None:
        outermost = self.problem.outermost
        gradient = torch.cat([p.grad.reshape(-1) for p in outermost.parameters])
        # The outer step came last: the levels inside are where the hypergradient was taken.
        other = cleaning(self.estimator, **self.options)
        with torch.no_grad():
            for level in other:
                values = self.before[level.name] if level is other.outermost else self.problem[level.name].parameters
                for variable, value in zip(level.parameters, values, strict=True):
                    variable.copy_(value)
        self.errors.append(distance(gradient, flat(mlopt.hypergradient(other).gradient)))
        report = run.engine.gradients.reports["model"]
        self.products.append(report.products)
        self.residuals.append(report.residual)


@pytest.mark.parametrize(
    ("changed", "truth"),
    [
        ({}, {}),
        ({"damping": 0.1}, {"damping": 0.1}),
        ({"products": "forward"}, {}),
        ({"products": "finite_difference"}, {}),
        ({"products": "gauss_newton"}, {"products": "gauss_newton"}),
    ],
    ids=["autograd", "damped", "forward", "differences", "gauss_newton"],
)
def test_hypergradients_of_a_run_hold_at_one_product_a_step(
    changed: Mapping[str, Any], truth: Mapping[str, Any]
) -> None:
    problem = cleaning(mlopt.ConjugateGradient(iterations=60, rtol=1e-2, history=20, **changed))
    watch = Watch(mlopt.Dense(**truth), problem)
    mlopt.solve(problem, 40, callbacks=[watch], progress=False)
    assert max(watch.residuals) <= 1e-2
    assert max(watch.errors) <= 3e-2
    assert sum(watch.products[15:]) / 25 <= 1.3
    assert watch.products[0] > 5


def test_in_single_precision() -> None:
    problem = cleaning(RULE, dtype=torch.float32)
    watch = Watch(mlopt.Dense(), problem, dtype=torch.float32)
    mlopt.solve(problem, 30, callbacks=[watch], progress=False)
    assert max(watch.errors) <= 1e-2


def test_in_half_precision() -> None:
    """The variables and the vectors of the solver are in bfloat16, the pairs in single precision."""
    problem = cleaning(mlopt.ConjugateGradient(iterations=20, rtol=5e-2, history=12), dtype=torch.bfloat16)
    seen: list[tuple[int, float]] = []

    class Reports(mlopt.Callback):
        def on_step_end(self, run: Any) -> None:
            report = run.engine.gradients.reports["model"]
            seen.append((report.products, report.residual))
            assert run.engine.gradients.carryover.histories["model"].directions[0].dtype == torch.float32

    mlopt.solve(problem, 25, callbacks=[Reports()], progress=False)
    assert max(residual for _, residual in seen) <= 5e-2
    assert sum(products for products, _ in seen[10:]) / 15 <= 1.5


class Clamped(torch.optim.SGD):
    """Gradient descent with non-negative variables."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for variable in group["params"]:
                    variable.clamp_(min=0.0)
        return result


def test_variables_at_a_bound_are_as_in_cold_solves() -> None:
    """A run takes the same steps with and without a history while variables come to their bounds and leave them."""
    gradients, held = [], []
    for history in (0, 20):
        problem = cleaning(
            mlopt.ConjugateGradient(iterations=100, rtol=1e-11, history=history), optimizer=partial(Clamped, lr=0.2)
        )
        watch = Kept(problem)
        mlopt.solve(problem, 25, callbacks=[watch], progress=False)
        gradients.append(torch.stack(watch.gradients))
        held.append(torch.stack([x == 0 for x in watch.values]))
    assert torch.equal(*held)
    assert len({int(row.sum()) for row in held[0]}) >= 2
    assert distance(gradients[1], gradients[0]) <= 1e-8


class Kept(mlopt.Callback):
    """Keeps the hypergradients of a run, and the variables of its inner level."""

    def __init__(self, problem: mlopt.Problem) -> None:
        self.problem = problem
        self.gradients: list[Tensor] = []
        self.values: list[Tensor] = []

    def on_step_end(self, run: Any) -> None:
        self.gradients.append(flatten([p.grad for p in self.problem.outermost.parameters]).clone())
        self.values.append(flatten(self.problem["model"].parameters).detach().clone())


def test_the_mixed_product_is_that_of_the_solution() -> None:
    """A start that does not meet the tolerance leaves a mixed product that must not be used."""
    problem = cleaning(mlopt.ConjugateGradient(iterations=60, rtol=1e-10, history=12))
    watch = Watch(mlopt.Dense(), problem)
    mlopt.solve(problem, 10, callbacks=[watch], progress=False)
    assert min(watch.products) > 1
    assert max(watch.errors) <= 1e-8


@pytest.mark.parametrize(("shape", "level"), [("two", "y"), ("nested", "y")])
def test_the_pullback_of_zero_is_zero_and_keeps_the_history(shape: str, level: str) -> None:
    problem = quadratic(shape, RULE, size=3).problem
    point = point_of(problem, warm={})
    like = problem[level].parameters
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        cotangent = tuple(torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in like)
        RULE.linearize(point, level).pullback({level: cotangent})
    kept = point.history(level)
    assert kept is not None
    assert kept.directions
    copies = [x.clone() for x in (*kept.solution, *kept.directions, *kept.images)]
    rule = RULE.linearize(point, level)
    out = rule.pullback({level: zeros_like(like)})
    assert not any(x.any() for vectors in out.values() for x in vectors)
    assert rule.report.products == 0
    assert point.history(level) is kept
    assert all(map(torch.equal, copies, (*kept.solution, *kept.directions, *kept.images)))


@pytest.mark.parametrize("shape", ["two", "chain_of_three", "nested"])
def test_closed_forms_hold_for_repeated_pullbacks(shape: str) -> None:
    """Within a run's state, every hypergradient is right: the first, and those that start from a history."""
    case = quadratic(shape, mlopt.ConjugateGradient(iterations=200, rtol=1e-12, history=8))
    state = Carryover()
    for _ in range(3):
        point = point_of(case.problem)
        point = Point(case.problem, point.batches, point.generators, carryover=state)
        level = case.problem.outermost
        with at_solutions(point, level):
            loss = Objective.of(level, point).value()
            gradient = total_derivative(point, level, partial_derivatives(point, level, loss))
        assert case.error(dict(zip(level.parameter_names, gradient, strict=True))) < 1e-8
    assert state.histories


def test_standalone_calls_neither_use_nor_move_a_history() -> None:
    problem = cleaning(RULE)
    seen: list[Any] = []

    class Call(mlopt.Callback):
        def on_step_end(self, run: Any) -> None:
            histories = run.engine.gradients.carryover.histories
            before = dict(histories)
            seen.append(mlopt.hypergradient(problem).reports["model"])
            assert {name: id(h) for name, h in histories.items()} == {name: id(h) for name, h in before.items()}

    mlopt.solve(problem, 20, callbacks=[Call()], progress=False)
    fresh = mlopt.hypergradient(problem).reports["model"]
    assert seen[-1].products > 5
    # A cold solve of a similar point takes as many.
    assert abs(seen[-1].products - fresh.products) <= 2
    assert problem.workspace.state_dict().keys() == {"calls", "streams", "lengths"}


def test_freezing_parameters_drops_the_history() -> None:
    problem = quadratic("two", RULE, size=3).problem
    for level in problem:
        object.__setattr__(level, "optimizer", partial(torch.optim.SGD, lr=1e-2))
    sizes: list[int] = []

    class Freeze(mlopt.Callback):
        def on_step_begin(self, run: Any) -> None:
            if run.step == 5:
                problem["y"].parameters[0].requires_grad_(False)

        def on_step_end(self, run: Any) -> None:
            history = run.engine.gradients.carryover.histories["y"]
            sizes.append(flatten(history.solution).numel())
            assert run.engine.gradients.reports["y"].residual <= 1e-3

    mlopt.solve(problem, 8, callbacks=[Freeze()], progress=False)
    assert sizes[4] == 7
    assert sizes[5] == 1


@pytest.mark.parametrize("history", [-1, 2.0, None, True])
def test_the_number_of_pairs_is_checked(history: Any) -> None:
    with pytest.raises(mlopt.ArgumentError, match=r"ConjugateGradient: history=.*; it must be a whole number >= 0"):
        mlopt.ConjugateGradient(history=history)
