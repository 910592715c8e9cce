"""The stationarity in reports: the gradient of what an optimiser minimises, at no evaluation of its own."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

import mlopt

F64 = torch.float64
GENERATOR = torch.Generator().manual_seed(0)
A, B = (torch.randn(*shape, generator=GENERATOR, dtype=F64) for shape in ((30, 4), (30,)))
HESSIAN = A.T @ A / 30
OUTER, START = torch.full((4,), 0.3, dtype=F64), torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=F64)
DECAY = 0.5


class Counted:
    """Least squares; it counts its evaluations."""

    def __init__(self, scale: float = 1.0) -> None:
        self.calls, self.scale = 0, scale

    def __call__(self, model: Any, batch: Any, *, outer: Any) -> Tensor:
        self.calls += 1
        return self.scale * (A @ model() - B).square().mean() / 2 - model() @ outer()


def build(estimator: mlopt.Estimator, loss: Any = None, **options: Any) -> mlopt.Problem:
    options = {"optimizer": partial(SGD, lr=0.1, weight_decay=DECAY), "steps": 3} | options
    return mlopt.Problem(
        mlopt.Level(
            "outer",
            mlopt.variables(OUTER),
            lambda own, batch, *, model: model().square().sum(),
            optimizer=partial(SGD, lr=0.0),
        ),
        mlopt.Level("model", mlopt.variables(START), loss or Counted(), estimator=estimator, **options),
    )


def gradient(x: Tensor, decay: float = DECAY) -> Tensor:
    return HESSIAN @ x - A.T @ B / 30 - OUTER + decay * x


@pytest.mark.parametrize(
    ("estimator", "evaluations"),
    [
        (mlopt.Dense(), 1),
        (mlopt.Identity(products="autograd"), 1),
        (mlopt.ConjugateGradient(products="forward"), 5),  # four iterations and the mixed product
        (mlopt.ConjugateGradient(products="finite_difference"), 10),
        (mlopt.MINRES(products="gauss_newton"), 2),
    ],
    ids=str,
)
def test_products_leave_the_gradient_behind(estimator: mlopt.Estimator, evaluations: int) -> None:
    loss = Counted()
    problem = build(estimator, loss)
    mlopt.hypergradient(problem)  # verifies products and functions, once
    loss.calls = 0
    report = mlopt.hypergradient(problem).reports["model"]
    assert report.gradient_norm == pytest.approx(float(gradient(START).norm()), rel=1e-9)
    assert loss.calls == evaluations


def test_differences_of_the_mixed_product_alone_know_no_gradient_outside_a_run() -> None:
    loss = Counted()
    problem = build(mlopt.FiniteDifference(), loss)
    mlopt.hypergradient(problem)
    loss.calls = 0
    report = mlopt.hypergradient(problem).reports["model"]
    assert report.gradient_norm is None
    assert report.stationarity is None
    assert loss.calls == 2


@pytest.mark.parametrize("clip", [None, 0.1])
def test_in_a_run_the_last_step_leaves_the_gradient_behind(clip: float | None) -> None:
    problem = build(mlopt.FiniteDifference(), clip=clip)
    report = mlopt.solve(problem, 1, progress=False).reports["model"]
    x = START.clone()
    for _ in range(3):
        raw = gradient(x, 0.0)
        x = x - 0.1 * ((raw if clip is None else raw * clip / raw.norm()) + DECAY * x)
    size = float((raw + DECAY * x).norm())
    assert report.gradient_norm == pytest.approx(size, rel=1e-5)
    assert report.stationarity == pytest.approx(size / (float(x.norm()) + size), rel=1e-5)


def test_unrolled_assumes_no_solution() -> None:
    pytest.importorskip("torchopt")
    report = mlopt.solve(build(mlopt.Unrolled(steps=2)), 1, progress=False).reports["model"]
    assert report.gradient_norm is None
    assert report.stationarity is None


def test_it_is_the_distance_where_the_curvature_is_one_number() -> None:
    def round_loss(model: Any, batch: Any, *, outer: Any) -> Tensor:
        return 2.5 * (model() - outer()).square().sum()

    report = mlopt.hypergradient(build(mlopt.ConjugateGradient(), round_loss)).reports["model"]
    away = float((START - 5 * OUTER / 5.5).norm())
    assert report.stationarity == pytest.approx(away / (away + float(START.norm())), rel=1e-12)


def test_it_bounds_the_distance_and_falls_with_the_steps() -> None:
    solution = torch.linalg.solve(HESSIAN + DECAY * torch.eye(4, dtype=F64), A.T @ B / 30 + OUTER)
    found = []
    for steps in (1, 10, 100):
        problem = build(mlopt.Dense(), steps=steps, optimizer=partial(SGD, lr=0.5, weight_decay=DECAY))
        report = mlopt.solve(problem, 1, progress=False).reports["model"]
        x = problem["model"].parameters[0].detach()
        distance = float((x - solution).norm())
        found.append(report.stationarity)
        assert distance / (float(x.norm()) + distance) <= found[-1] * 1.001 + 1e-12  # type: ignore[operator]
        assert not report.doubtful  # few steps are no remark
    assert found[0] > 10 * found[1] > 1e3 * found[2]  # type: ignore[operator]


def test_it_does_not_depend_on_units() -> None:
    def report(scale: float) -> mlopt.Report:
        def loss(model: Any, batch: Any, *, outer: Any) -> Tensor:
            return scale * ((A @ model() - B).square().mean() / 2 - model() @ outer())

        optimizer = partial(SGD, lr=0.1 / scale, weight_decay=scale * DECAY)
        return mlopt.hypergradient(build(mlopt.MINRES(), loss, optimizer=optimizer)).reports["model"]

    assert report(1e-4).stationarity == pytest.approx(report(1.0).stationarity, rel=1e-9)
    assert report(1e-4).gradient_norm == pytest.approx(1e-4 * report(1.0).gradient_norm, rel=1e-9)  # type: ignore[operator]


def test_the_advice_for_an_unfinished_level_names_it_and_its_distance() -> None:
    with pytest.raises(mlopt.DisagreementError, match=r"give 'model' \(its solution is .* away\) more steps"):
        mlopt.check_hypergradient(build(mlopt.Dense()), oracle="resolve")
    finding = next(f for f in mlopt.diagnose(build(mlopt.Dense())).levels["model"].findings if "stationary" in str(f))
    assert finding.severity == "warning"
