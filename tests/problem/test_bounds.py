"""Variables that a projecting optimiser holds at a bound, against a long projected loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fixed_point import F64, HESSIAN, OUTER, A, B, C, D, build, distance
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import mlopt
from mlopt.testing import same, snapshot


class Projected(SGD):
    """Gradient descent that clamps after each step."""

    bound: Callable[[Tensor], Tensor] = staticmethod(lambda x: x.clamp(min=0.0))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.data.copy_(self.bound(p.data))


class Ball(Projected):
    bound = staticmethod(lambda x: x / max(1.0, float(x.norm()) / 0.3))


class Simplex(Projected):
    @staticmethod
    def bound(x: Tensor) -> Tensor:
        ordered, _ = x.sort(descending=True)
        sums = (ordered.cumsum(0) - 1) / torch.arange(1, len(x) + 1)
        return (x - sums[(ordered > sums).nonzero().max()]).clamp(min=0.0)


def hooked(parameters: Any, kind: Any = SGD) -> Optimizer:
    optimizer: Optimizer = kind(parameters, lr=0.1)
    optimizer.register_step_post_hook(lambda own, *_: [p.data.clamp_(min=0.0) for p in own.param_groups[0]["params"]])
    return optimizer


def projected(outer: Tensor, bound: Callable[[Tensor], Tensor] = Projected.bound) -> Tensor:
    x = torch.zeros(4, dtype=F64)
    for _ in range(2_000):
        x = bound(x - 0.1 * (HESSIAN @ x - A.T @ B / 20 - outer))
    return x


def differences(bound: Callable[[Tensor], Tensor] = Projected.bound) -> Tensor:
    def value(outer: Tensor) -> Tensor:
        return (C @ projected(outer, bound) - D).square().mean()

    return torch.stack([(value(OUTER + e) - value(OUTER - e)) / 2e-4 for e in 1e-4 * torch.eye(4, dtype=F64)])


EXACT = [
    mlopt.Dense(),
    mlopt.ConjugateGradient(products="finite_difference"),
    mlopt.MINRES(products="forward"),
    mlopt.Neumann(iterations=500),
    mlopt.ValueFunction(steps=500),
]


def test_a_variable_is_at_its_bound() -> None:
    x = projected(OUTER)
    assert 0 < (x == 0).sum() < 4


@pytest.mark.parametrize("estimator", EXACT, ids=str)
@pytest.mark.parametrize("optimizer", [partial(Projected, lr=0.1), hooked, partial(hooked, kind=Adam)])
def test_the_solution_moves_in_the_free_variables(optimizer: Any, estimator: mlopt.Estimator) -> None:
    problem = build(optimizer, estimator, projected(OUTER))
    before = snapshot(problem)
    result = mlopt.hypergradient(problem)
    assert same(before, snapshot(problem))
    assert distance(result, differences()) < 1e-7
    unbounded = mlopt.hypergradient(build(partial(SGD, lr=0.1), estimator, projected(OUTER)))
    assert distance(unbounded, differences()) > 0.05


def test_check_diagnosis_and_run_know_the_bound() -> None:
    problem = build(partial(Projected, lr=0.1), mlopt.Dense(), projected(OUTER))
    assert mlopt.check_hypergradient(problem, oracle="resolve", tolerance=1e-6).error < 1e-6
    diagnosis = mlopt.diagnose(problem)
    assert diagnosis.safe
    assert "held at a bound" in str(diagnosis)
    run = mlopt.solve(problem, 2, progress=False)
    assert run.reports["model"].stationarity < 1e-12  # type: ignore[operator]
    assert float((problem["outer"].parameters[0].grad - differences()).norm()) < 1e-7  # type: ignore[operator]


@settings(max_examples=30, deadline=None)
@given(
    targets=st.lists(st.floats(-2, 2).filter(lambda x: abs(x) > 0.1), min_size=1, max_size=4),
    start=st.lists(st.sampled_from([0.0, 0.5, 1.5]), min_size=4, max_size=4),
)
def test_resolving_is_refused_if_the_bounds_at_the_solution_are_others(
    targets: list[float], start: list[float]
) -> None:
    """The solution is max(0, u); L-BFGS does not know the bounds, and leaves what is held at the start where it is."""
    u, x = torch.tensor(targets, dtype=F64), torch.tensor(start[: len(targets)], dtype=F64)
    problem = mlopt.Problem(
        mlopt.Level("outer", mlopt.variables(u), lambda outer, batch, *, model: (model() ** 2).sum()),
        mlopt.Level(
            "model",
            mlopt.variables(x),
            lambda model, batch, *, outer: ((model() - outer()) ** 2).sum(),
            optimizer=partial(Projected, lr=0.1),
            estimator=mlopt.Dense(),
        ),
    )
    if ((u < 0) == (x == 0)).all():
        check = mlopt.check_hypergradient(problem, oracle="resolve", tolerance=10.0)
        assert check.error_at_solution < 1e-6
    elif ((u < 0) & (x > 0)).any():
        with pytest.raises(
            mlopt.EstimatorError, match=r"'model' would hold other variables at a bound .* take more steps"
        ):
            mlopt.check_hypergradient(problem, oracle="resolve", tolerance=10.0)


def test_resolving_is_refused_if_the_solution_leaves_a_bound() -> None:
    """At (1.5, 0) the second variable is pushed to its bound; the solution is (0.1, 0.4)."""
    problem = mlopt.Problem(
        mlopt.Level("outer", mlopt.variables(torch.ones(1, dtype=F64)), lambda outer, batch, *, model: model().sum()),
        mlopt.Level(
            "model",
            mlopt.variables(torch.tensor([1.5, 0.0], dtype=F64)),
            lambda model, batch, *, outer: (model()[0] - 0.1 * outer()[0]) ** 2 + (model().sum() - 0.5) ** 2,
            optimizer=partial(Projected, lr=0.1),
            estimator=mlopt.Dense(),
        ),
    )
    with pytest.raises(mlopt.EstimatorError, match=r"'model' would hold other variables at a bound .* \(1 of them\)"):
        mlopt.check_hypergradient(problem, oracle="resolve", tolerance=10.0)


@pytest.mark.parametrize("optimizer", [hooked, partial(Projected, lr=0.1)])
def test_a_run_sees_the_bounds_without_calls_of_hooks(optimizer: Any) -> None:
    counts: list[Any] = []

    def counted(parameters: Any) -> Optimizer:
        made: Optimizer = optimizer(parameters)
        made.register_step_post_hook(lambda *_: counts.append(None))
        return made

    problem = build(counted, mlopt.Dense(), projected(OUTER))
    mlopt.solve(problem, 2, progress=False)
    assert float((problem["outer"].parameters[0].grad - differences()).norm()) < 1e-6  # type: ignore[operator]
    taken = len(counts)
    x = torch.nn.Parameter(projected(OUTER))
    by_hand = counted([x])
    for _ in range(10):
        x.grad = HESSIAN @ x.detach() - A.T @ B / 20 - OUTER
        by_hand.step()
    assert taken == len(counts) - taken


def test_a_step_that_rounding_swallows_is_at_no_bound() -> None:
    """In float32, a step of 1e-9 leaves 1 unchanged, and moves 0."""
    x = mlopt.variables(torch.tensor([1.0, 0.0], dtype=torch.float32))
    optimizer = SGD(x.parameters(), lr=1e-9)
    optimizer.register_step_post_hook(lambda *_: None)
    problem = mlopt.Problem(
        mlopt.Level(
            "outer",
            mlopt.variables(torch.ones(2)),
            lambda own, batch, *, model: model().sum(),
            optimizer=partial(SGD, lr=0.1),
        ),
        mlopt.Level(
            "model",
            x,
            lambda own, batch, *, outer: (own() - 2 * outer()).square().sum() / 2,
            optimizer=optimizer,
            estimator=mlopt.Dense(),
        ),
    )
    mlopt.solve(problem, 1, progress=False)
    assert x.value.detach()[0] == 1.0
    assert problem["outer"].parameters[0].grad.tolist() == pytest.approx([2.0, 2.0])  # type: ignore[union-attr]


@pytest.mark.parametrize("products", ["autograd", "finite_difference"])
def test_a_variable_that_decay_holds_is_at_no_bound(products: str) -> None:
    """The steps end at x = u / 1.5, where the decay cancels the gradient. A variable that rests there is not at a bound."""
    x = mlopt.variables(torch.tensor([0.5, 0.0], dtype=F64))
    problem = mlopt.Problem(
        mlopt.Level(
            "outer",
            mlopt.variables(torch.tensor([0.75, -1.0], dtype=F64)),
            lambda own, batch, *, model: model().sum(),
            optimizer=partial(SGD, lr=0.0),
        ),
        mlopt.Level(
            "model",
            x,
            lambda own, batch, *, outer: (own() - outer()).square().sum() / 2,
            optimizer=partial(hooked, kind=partial(SGD, weight_decay=0.5)),
            estimator=mlopt.Dense(products=products),
        ),
    )
    expected = torch.tensor([1 / 1.5, 0.0], dtype=F64)
    torch.testing.assert_close(in_a_run(problem, "outer"), expected, rtol=0, atol=1e-8)
    assert x.value.tolist() == [0.5, 0.0]


@pytest.mark.parametrize("kind", [Ball, Simplex])
def test_a_constraint_on_several_variables_is_doubtful(kind: type[Projected]) -> None:
    problem = build(partial(kind, lr=0.1), mlopt.Dense(), projected(OUTER, kind.bound))
    with pytest.warns(mlopt.TrustWarning, match="not a bound on each of them"):
        report = mlopt.hypergradient(problem).reports["model"]
    assert report.doubtful
    assert report.stationarity > 0.1  # type: ignore[operator]
    assert not mlopt.diagnose(problem).safe


def test_a_free_level_of_an_optimizer_of_ones_own_is_not_doubtful() -> None:
    problem = build(partial(Projected, lr=0.1), mlopt.Dense(), torch.ones(4, dtype=F64))
    plain = build(partial(SGD, lr=0.1), mlopt.Dense(), torch.ones(4, dtype=F64))
    expected = mlopt.hypergradient(plain).gradient["value"]
    assert distance(mlopt.hypergradient(problem), expected) < 1e-12


def test_a_rate_of_zero_holds_nothing() -> None:
    problem = build(partial(Projected, lr=0.0), mlopt.Dense(), torch.ones(4, dtype=F64))
    assert not mlopt.hypergradient(problem).reports["model"].doubtful


def test_unrolled_refuses_steps_that_it_would_not_take() -> None:
    pytest.importorskip("torchopt")
    with pytest.raises(mlopt.EstimatorError, match="step hooks"):
        mlopt.hypergradient(build(hooked, mlopt.Unrolled(steps=3)))


class Parts(nn.Module):
    """Four variables in two tensors."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.first, self.last = nn.Parameter(value[:3].clone()), nn.Parameter(value[3:].clone())

    def forward(self) -> Tensor:
        return torch.cat([self.first, self.last])


def in_parts(optimizer: Any, estimator: mlopt.Estimator, value: Tensor) -> mlopt.Problem:
    def inner(y: nn.Module, batch: Any, *, x: nn.Module) -> Tensor:
        return y() @ HESSIAN @ y() / 2 - y() @ (A.T @ B / 20 + x())

    def outer(x: nn.Module, batch: Any, *, y: nn.Module) -> Tensor:
        return (C @ y() - D).square().mean()

    return mlopt.Problem(
        mlopt.Level("x", mlopt.variables(OUTER), outer),
        mlopt.Level("y", Parts(value), inner, optimizer=optimizer, estimator=estimator),
    )


def resting(parameters: Any) -> Optimizer:
    first, last = parameters
    return SGD([{"params": [first]}, {"params": [last], "lr": 0.0}], lr=0.1)


@pytest.mark.parametrize("products", ["autograd", "forward", "finite_difference"])
def test_variables_with_a_rate_of_zero_do_not_move(products: str) -> None:
    """Closed form: the last variable is a constant, and the others solve their rows."""

    def value(outer: Tensor) -> Tensor:
        last = torch.full((1,), 0.3, dtype=F64)
        right = (A.T @ B / 20 + outer)[:3] - HESSIAN[:3, 3] * last
        y = torch.cat([torch.linalg.solve(HESSIAN[:3, :3], right), last])
        return (C @ y - D).square().mean()

    expected = torch.func.grad(value)(OUTER)
    last = torch.full((1,), 0.3, dtype=F64)
    solved = torch.linalg.solve(HESSIAN[:3, :3], (A.T @ B / 20 + OUTER)[:3] - HESSIAN[:3, 3] * last)
    problem = in_parts(resting, mlopt.Dense(products=products), torch.cat([solved, last]))
    result = mlopt.hypergradient(problem)
    assert distance(result, expected) < 1e-8
    assert not result.reports["y"].doubtful


@pytest.mark.parametrize("estimator", [mlopt.Dense(), mlopt.Unrolled(steps=3)], ids=str)
@pytest.mark.parametrize("made", [False, True], ids=["factory", "instance"])
def test_an_optimizer_that_leaves_out_variables_is_refused_as_in_a_run(made: bool, estimator: mlopt.Estimator) -> None:
    def partly(parameters: Any) -> Optimizer:
        return SGD(list(parameters)[:1], lr=0.1)

    problem = in_parts(partly, estimator, OUTER)
    if made:
        inner = problem["y"]
        optimizer = partly(inner.module.parameters())
        again = mlopt.Level("y", inner.module, inner.loss, optimizer=optimizer, estimator=estimator)
        problem = mlopt.Problem(problem["x"], again)
    with pytest.raises(mlopt.ProblemError, match="its optimizer leaves out 1 of the level's 2 trainable tensors"):
        mlopt.hypergradient(problem)


class Two(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.bounded, self.other = (nn.Parameter(torch.zeros(n, dtype=dtype)) for n in (2, 1))


def clamped_beside(rate: float, dtype: torch.dtype, *, clamp: bool = True) -> mlopt.Problem:
    """Return a level whose optimiser clamps one variable at 1, beside a variable with its own learning rate.

    The free one of the clamped variables is y_0 = u_0 - (1 - u_1) / 4.
    """
    module = Two(dtype)

    def optimizer(_: Any) -> Optimizer:
        made = SGD([{"params": [module.bounded]}, {"params": [module.other], "lr": rate}], lr=0.25)
        if clamp:
            made.register_step_post_hook(lambda *_: module.bounded.data.clamp_(max=1.0))
        return made

    def loss(own: Two, batch: Any, *, u: nn.Module) -> Tensor:
        a, b = own.bounded - u()[:2], own.other - u()[2:]
        return (a.square().sum() + 0.5 * a[0] * a[1] + b.square().sum()) / 2

    def outer(u: nn.Module, batch: Any, *, y: Two) -> Tensor:
        return y.bounded @ torch.tensor([1.0, 10.0], dtype=dtype) + 7 * y.other.sum() + 0 * u().sum()

    start = mlopt.variables(torch.tensor([0.25, 3.0, 1.0], dtype=dtype))
    return mlopt.Problem(
        mlopt.Level("u", start, outer, optimizer=partial(SGD, lr=0.0)),
        mlopt.Level("y", module, loss, optimizer=optimizer, steps=200, estimator=mlopt.Dense()),
    )


def in_a_run(problem: mlopt.Problem, outer: str = "u") -> Tensor:
    seen: list[Tensor] = []

    class Note(mlopt.Callback):
        def on_step_end(self, run: Any) -> None:
            seen.append(run.problem[outer].module.value.grad.double())

    mlopt.solve(problem, steps=1, callbacks=[Note()], progress=False)
    return seen[-1]


@pytest.mark.parametrize("rate", [0.25, 0.0])
def test_a_bound_beside_a_rate_of_zero(rate: float) -> None:
    problem = clamped_beside(rate, F64)
    expected = torch.tensor([1.0, 0.25, 7.0 if rate else 0.0], dtype=F64)
    torch.testing.assert_close(in_a_run(problem), expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(mlopt.hypergradient(problem).gradient["value"], expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_rate_of_zero_in_any_dtype(dtype: torch.dtype) -> None:
    problem = clamped_beside(0.0, dtype, clamp=False)
    expected = torch.tensor([1.0, 10.0, 0.0], dtype=F64)
    torch.testing.assert_close(in_a_run(problem), expected, rtol=0, atol=0.1)
    torch.testing.assert_close(mlopt.hypergradient(problem).gradient["value"].double(), expected, rtol=0, atol=0.1)
