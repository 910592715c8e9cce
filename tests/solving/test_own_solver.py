"""A level with a solver of its own: closed forms, runs, and refusals."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from core_cases import distance, drawn, flat, seeds
from hypothesis import given
from hypothesis import strategies as st
from option_cases import F64, vector
from states import assert_same_state
from torch import Tensor, nn
from torch.optim import SGD, Adam

import mlopt
from mlopt import Level, Problem
from mlopt.testing import same, snapshot

EXACT = [mlopt.Dense(), mlopt.ConjugateGradient(iterations=50, rtol=1e-14)]


def draw(seed: int, count: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, size, generator=generator, dtype=F64)
    return inputs, torch.randn(count, generator=generator, dtype=F64)


def training(model: Any, batch: Any, *, penalty: Any) -> Tensor:
    inputs, targets = batch
    return (inputs @ model() - targets).square().mean() + penalty().exp().sum() * model().square().sum()


def validation(penalty: Any, batch: Any, *, model: Any) -> Tensor:
    return (batch[0] @ model() - batch[1]).square().mean()


def solution(batch: Any, penalty: Tensor) -> Tensor:
    inputs, targets = batch
    size = inputs.shape[1]
    matrix = inputs.T @ inputs / len(inputs) + penalty.exp().sum() * torch.eye(size, dtype=F64)
    return torch.linalg.solve(matrix, inputs.T @ targets / len(inputs))


def closed_form(model: Any, batch: Any, *, penalty: Any) -> None:
    model.value.data.copy_(solution(batch, penalty().detach()))


def lbfgs(model: Any, batch: Any, *, penalty: Any) -> None:
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, tolerance_grad=1e-11, tolerance_change=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = training(model, batch, penalty=penalty)
        loss.backward()
        return loss

    optimizer.step(closure)


def ridge(
    seed: int = 0,
    size: int = 4,
    *,
    start: float = -1.0,
    batches: int = 1,
    outer: dict[str, Any] | None = None,
    **options: Any,
) -> Problem:
    """Return the log penalty of a ridge regression of weights that start at zero; `options` are those of the regression."""
    own = {"solver": closed_form, "estimator": mlopt.Dense(), "loss": training} | options
    return Problem(
        Level(
            "penalty",
            vector(start),
            validation,
            data=[draw(seed + 1, 30, size)],
            **{"optimizer": partial(SGD, lr=0.1), **(outer or {})},
        ),
        Level(
            "model",
            mlopt.variables(torch.zeros(size, dtype=F64)),
            data=[draw(seed + 2 + k, 20, size) for k in range(batches)],
            **own,
        ),
    )


def expected(problem: Problem, penalty: Tensor) -> Tensor:
    """Return the derivative of the validation loss by the log penalty through the closed form."""
    penalty = penalty.detach().clone().requires_grad_()
    (batch,), (held_out,) = problem["model"].data, problem["penalty"].data  # type: ignore[misc, union-attr]
    loss = (held_out[0] @ solution(batch, penalty) - held_out[1]).square().mean()
    return torch.autograd.grad(loss, penalty)[0]


@given(seeds, st.integers(1, 6), st.floats(-4.0, 2.0), st.sampled_from(EXACT))
@drawn(30)
def test_the_hypergradient_of_a_closed_form_is_exact(
    seed: int, size: int, start: float, estimator: mlopt.Estimator
) -> None:
    problem = ridge(seed, size, start=start, estimator=estimator)
    result = mlopt.hypergradient(problem)
    assert distance(flat(result.gradient), expected(problem, vector(start).value)) < 1e-8
    stationarity = result.reports["model"].stationarity
    assert stationarity is not None
    assert stationarity < 1e-12


@given(seeds, st.floats(-4.0, 2.0), st.sampled_from(EXACT))
@drawn(10)
def test_steps_in_a_run_follow_the_closed_form(seed: int, start: float, estimator: mlopt.Estimator) -> None:
    problem = ridge(seed, start=start, estimator=estimator)
    penalty = vector(start).value.detach().clone()
    mlopt.solve(problem, 3, progress=False)
    for _ in range(3):
        penalty -= 0.1 * expected(problem, penalty)
    assert distance(problem["penalty"].module.value.detach(), penalty) < 1e-8


def test_lbfgs_reaches_the_same_gradient_and_leaves_no_trace() -> None:
    problem = ridge(solver=lbfgs, estimator=EXACT[1])
    for level in problem:
        level.parameters[0].grad = torch.full_like(level.parameters[0], 0.3)
    before = snapshot(problem)
    result = mlopt.hypergradient(problem)
    assert same(before, snapshot(problem))
    assert distance(flat(result.gradient), expected(problem, vector(-1.0).value)) < 1e-8


def test_a_solver_of_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")

    def fit(model: Any, batch: Any, *, penalty: Any) -> None:
        alpha = len(batch[0]) * float(penalty().detach().exp().sum())
        fitted = linear_model.Ridge(alpha=alpha, fit_intercept=False, tol=1e-14).fit(batch[0].numpy(), batch[1].numpy())
        model.value.data.copy_(torch.from_numpy(fitted.coef_))

    problem = ridge(solver=fit)
    gradient = flat(mlopt.hypergradient(problem).gradient)
    assert distance(gradient, expected(problem, vector(-1.0).value)) < 1e-8


def test_a_solver_that_stops_early_is_reported_as_far_from_stationary() -> None:
    def nothing(model: Any, batch: Any, *, penalty: Any) -> None:
        """Leave the weights at zero."""

    problem = ridge(solver=nothing)
    (batch,) = problem["model"].data  # type: ignore[misc, union-attr]
    size = float((2 * batch[0].T @ batch[1] / len(batch[0])).norm())
    with pytest.warns(mlopt.TrustWarning, match="its solver left it about 100%"):
        report = mlopt.hypergradient(problem).reports["model"]
    assert report.gradient_norm == pytest.approx(size, rel=1e-12)
    assert report.stationarity == 1.0  # the weights are zero
    with pytest.warns(mlopt.TrustWarning, match="its solver left it about 100%"):
        run = mlopt.solve(problem, 1, progress=False)
    assert run.reports["model"].gradient_norm == pytest.approx(size, rel=1e-12)
    assert run.history.column("model/gradient_norm")[0] == pytest.approx(size, rel=1e-12)


@pytest.mark.parametrize("last", ["x", "y"])
def test_a_level_that_was_solved_before_what_it_depends_on_moved_says_so(last: str) -> None:
    def outer(u: Any, batch: None, *, y: Any) -> Tensor:
        return y().square().sum()

    def middle(x: Any, batch: None, *, u: Any) -> Tensor:
        return (x() - 2 * u()).square().sum()

    def bottom(y: Any, batch: None, *, x: Any) -> Tensor:
        return (y() - 3 * x()).square().sum()

    def solve_middle(x: Any, batch: None, *, u: Any) -> None:
        x.value.data.copy_(2 * u().detach())

    def solve_bottom(y: Any, batch: None, *, x: Any) -> None:
        y.value.data.copy_(3 * x().detach())

    inside = [
        Level("x", vector(1.0), middle, solver=solve_middle, estimator=mlopt.Dense()),
        Level("y", vector(1.0), bottom, solver=solve_bottom, estimator=mlopt.Dense()),
    ]
    problem = Problem(
        Level("u", vector(1.0), outer, optimizer=partial(SGD, lr=0.0)), *(inside if last == "y" else inside[::-1])
    )
    if last == "x":  # y is solved last, although it is listed first
        assert mlopt.solve(problem, 1, progress=False).reports["y"].remarks == ()
        return
    with pytest.warns(mlopt.TrustWarning, match="or 'x' has moved since then; list it before 'x'"):
        mlopt.solve(problem, 1, progress=False)


def test_a_level_with_an_optimizer_reports_the_same_stationarity() -> None:
    stationarities = [
        mlopt.hypergradient(ridge(**options)).reports["model"].stationarity
        for options in ({}, {"solver": None, "optimizer": partial(SGD, lr=0.1)})
    ]
    assert stationarities[0] < 1e-12  # type: ignore[operator]
    assert stationarities[1] == 1.0


def test_a_level_inside_a_nested_level_is_solved() -> None:
    """z*(y) = y, y*(x) = argmin (y - x)^2 + z^2 = x / 2, and the outer loss is y."""

    def nest(outer: Any, batch: Any, *, middle: Any) -> Tensor:
        return middle().sum()

    def middle(own: Any, batch: Any, *, inner: Any, outer: Any) -> Tensor:
        return (own() - outer()).square().sum() + inner().square().sum()

    def inner(own: Any, batch: Any, *, middle: Any) -> Tensor:
        return (own() - middle()).square().sum()

    def solver(own: Any, batch: Any, *, middle: Any) -> None:
        own.value.data.copy_(middle().detach())

    problem = Problem(
        Level("outer", vector(3.0), nest, optimizer=partial(SGD, lr=0.1)),
        Level("middle", vector(1.5), middle, optimizer=partial(SGD, lr=0.25), steps=3, estimator=mlopt.Dense()),
        Level("inner", vector(0.0), inner, solver=solver, estimator=mlopt.Dense()),
    )
    result = mlopt.hypergradient(problem)
    assert distance(flat(result.gradient), torch.tensor([0.5], dtype=F64)) < 1e-8
    assert result.reports["inner"].stationarity == 0.0
    mlopt.solve(problem, 4, progress=False)
    assert distance(problem["outer"].module.value.detach(), torch.tensor([2.8], dtype=F64)) < 1e-8


@pytest.mark.parametrize("response", [None, mlopt.RealSteps(steps=1)])
def test_solvers_run_in_the_order_of_dependence(response: mlopt.Response | None) -> None:
    """Body* = u and head* = 2 body, so that the loss |head|^2 is 4 u^2; with them or by differences."""

    def outer(own: Any, batch: Any, *, head: Any) -> Tensor:
        return head().square().sum()

    def head(own: Any, batch: Any, *, body: Any) -> Tensor:
        return (own() - 2 * body()).square().sum()

    def solve_head(own: Any, batch: Any, *, body: Any) -> None:
        own.value.data.copy_(2 * body().detach())

    def body(own: Any, batch: Any, *, outer: Any) -> Tensor:
        return (own() - outer()).square().sum()

    def solve_body(own: Any, batch: Any, *, outer: Any) -> None:
        own.value.data.copy_(outer().detach())

    problem = Problem(
        Level("outer", vector(3.0), outer, optimizer=partial(SGD, lr=0.1), response=response),
        Level("head", vector(0.0), head, solver=solve_head, estimator=mlopt.Dense()),
        Level("body", vector(0.0), body, solver=solve_body, estimator=mlopt.Dense()),
    )
    result = mlopt.hypergradient(problem)
    assert float(result.loss) == 36.0
    assert distance(flat(result.gradient), torch.tensor([24.0], dtype=F64)) < 1e-8
    assert mlopt.check_hypergradient(problem, oracle="dense", tolerance=1e-8).error < 1e-8
    mlopt.solve(problem, 2, progress=False)
    assert distance(problem["outer"].module.value.detach(), torch.tensor([3 * 0.2**2], dtype=F64)) < 1e-8


def test_solver_and_loss_draw_the_same_numbers() -> None:
    """The solution for one draw of noise is stationary only for a loss, and a pullback, with the same draw."""

    def noisy(model: Any, batch: Any, *, penalty: Any) -> Tensor:
        noise = torch.rand(20, dtype=F64) + float(np.random.rand())
        return training(model, (batch[0], batch[1] + noise), penalty=penalty)

    def solver(model: Any, batch: Any, *, penalty: Any) -> None:
        noise = torch.rand(20, dtype=F64) + float(np.random.rand())
        closed_form(model, (batch[0], batch[1] + noise), penalty=penalty)
        torch.rand(5)

    problem = ridge(loss=noisy, solver=solver)
    assert mlopt.hypergradient(problem).reports["model"].stationarity < 1e-12  # type: ignore[operator]
    run = mlopt.solve(problem, 3, seed=0, progress=False)
    assert max(run.history.column("model/gradient_norm")) < 1e-12


class Head(nn.Module):
    """Weights, with a buffer that counts evaluations of the loss and of the solver."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(4, dtype=F64))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self) -> Tensor:
        self.calls += 1
        return self.value


def random_ridge() -> Problem:
    """Return a ridge regression whose solver is inexact, draws from two generators and counts its calls."""

    def solver(model: Any, batch: Any, *, penalty: Any) -> None:
        scale = 1 + 0.1 * torch.rand((), dtype=F64) + 0.1 * float(np.random.rand())
        model.value.data.lerp_(scale * solution(batch, penalty().detach()), 0.7)
        model()

    problem = ridge(solver=solver, batches=3, outer={"optimizer": partial(Adam, lr=0.1)})
    model = problem["model"]
    head = Level(
        "model", Head(), training, data=model.data, solver=solver, estimator=mlopt.ConjugateGradient(warm_start=True)
    )
    return Problem(problem["penalty"], head)


@pytest.mark.parametrize("options", [{}, {"lookahead": True}, {"on_nonfinite": "skip"}, {"on_nonfinite": "rollback"}])
def test_a_resumed_run_is_bit_equal(options: dict[str, Any], tmp_path: Path) -> None:
    def states(folder: Path, *steps: int) -> tuple[Any, Any]:
        problem = random_ridge()
        for k, count in enumerate(steps):
            if k:
                problem = random_ridge()
            checkpoint = mlopt.Checkpoints(folder, every=1)
            mlopt.solve(problem, count, seed=0, checkpoint=checkpoint, resume=k > 0, progress=False, **options)
        return mlopt.Checkpoints(folder).newest()[2], problem["model"].module.calls  # type: ignore[index]

    whole, calls = states(tmp_path / "whole", 6)
    parts, _ = states(tmp_path / "parts", 2, 3, 6)
    assert_same_state(whole, parts)
    # The solver keeps its change of the buffer; the evaluation that measures the solution does not.
    assert calls == 6


def test_look_ahead_solves_from_the_same_start_on_the_same_batches() -> None:
    seen: list[float] = []

    def solver(model: Any, batch: Any, *, penalty: Any) -> None:
        seen.append(float(batch[0][0, 0]))
        seen.append(float(model().detach().norm()))
        closed_form(model, batch, penalty=penalty)

    problem = ridge(batches=3, solver=solver)
    mlopt.solve(problem, 2, lookahead=True, progress=False)
    first, again, second, once_more = (seen[k : k + 2] for k in range(0, 8, 2))
    assert first == again
    assert second == once_more
    assert first != second
    assert len(seen) == 8


@pytest.mark.parametrize("how", ["skip", "rollback"])
def test_a_solution_that_is_not_finite_is_undone(how: str) -> None:
    calls = 0

    def solver(model: Any, batch: Any, *, penalty: Any) -> None:
        nonlocal calls
        calls += 1
        closed_form(model, batch, penalty=penalty)
        if calls == 2:
            model.value.data[0] = torch.nan

    problem = ridge(solver=solver, batches=2)
    ends: list[Tensor] = []

    class Watch(mlopt.Callback):
        def on_step_end(self, run: Any) -> None:
            ends.append(torch.cat([p.detach().clone() for level in problem for p in level.parameters]))

    run = mlopt.solve(problem, 3, on_nonfinite=how, callbacks=[Watch()], progress=False)
    assert run.history.column({"skip": "skipped", "rollback": "rollbacks"}[how]) == [0, 1, 1]
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[1], ends[2])
    calls = 1
    with pytest.raises(mlopt.NonFiniteError, match="'model' is nan"):
        mlopt.solve(problem, 1, progress=False)


def test_checks_and_diagnosis_are_made_at_the_solution() -> None:
    problem = ridge()
    before = snapshot(problem)
    for oracle, tolerance in {"dense": 1e-10, "resolve": 1e-6}.items():
        check = mlopt.check_hypergradient(problem, oracle=oracle, tolerance=tolerance)
        assert check.error < tolerance
        if oracle == "resolve":
            assert check.gradient_norms["model"] < 1e-12
            assert check.moved["model"] < 1e-10
    diagnosis = mlopt.diagnose(problem)
    assert diagnosis.safe
    assert any("ok: stationary" in f"{f.severity}: {f}" for f in diagnosis.levels["model"].findings)
    assert same(before, snapshot(problem))


def test_resolving_exposes_a_solver_of_another_problem() -> None:
    def other(model: Any, batch: Any, *, penalty: Any) -> None:
        model.value.data.copy_(0.5 * solution(batch, penalty().detach()))

    with pytest.raises(mlopt.DisagreementError, match="off by"):
        mlopt.check_hypergradient(ridge(solver=other), oracle="resolve", tolerance=1e-4)


def test_the_solver_is_part_of_the_problem_that_resumes(tmp_path: Path) -> None:
    mlopt.solve(ridge(), 1, seed=0, checkpoint=tmp_path, progress=False)
    stepped = ridge(solver=None, optimizer=partial(SGD, lr=0.1))
    with pytest.raises(mlopt.CheckpointError, match="is a solver of its own in the checkpoint and SGD"):
        mlopt.solve(stepped, 2, seed=0, checkpoint=tmp_path, resume=True, progress=False)
    assert "model  4 variables, refers to penalty, a solver of its own, Dense" in str(ridge())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": partial(SGD, lr=0.1)}, "optimizer=.* cannot be combined with solver"),
        ({"scheduler": lambda optimizer: None}, "scheduler=.* cannot be combined with solver"),
        ({"steps": 2}, "steps=2 cannot be combined with solver"),
        ({"warmup": 1}, "warmup=1 cannot be combined with solver"),
        ({"accumulate": 2}, "accumulate=2 cannot be combined with solver"),
        ({"clip": 1.0}, "clip=1.0 cannot be combined with solver"),
        ({"precision": "bf16"}, "precision='bf16' cannot be combined with solver"),
        ({"estimator": mlopt.SAMA()}, "estimator=.* uses the steps of an optimiser"),
        ({"solver": 3}, "is not callable"),
        ({"solver": lambda model, *, penalty: None}, "it must take 2"),
        ({"solver": lambda model, batch, *, other: None}, "refers to 'other', and its loss does not"),
        ({"solver": lambda model, batch, **others: None}, "name the levels"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(mlopt.ProblemError, match=message):
        ridge(**options)


def test_unrolling_is_refused() -> None:
    pytest.importorskip("torchopt")
    with pytest.raises(mlopt.ProblemError, match=r"unrolled step.* uses the steps of an optimiser"):
        ridge(estimator=mlopt.Unrolled(steps=2))


def test_places_without_a_single_solution_are_refused() -> None:
    def outermost(penalty: Any, batch: Any, *, model: Any) -> None: ...

    with pytest.raises(mlopt.ProblemError, match="the outermost level is not solved"):
        ridge(outer={"optimizer": None, "solver": outermost})

    def nested(own: Any, batch: Any, *, inner: Any, outer: Any) -> Tensor:
        return (own() - outer() - inner()).square().sum()

    def outer(own: Any, batch: Any, *, middle: Any) -> Tensor:
        return middle().sum()

    def inner(own: Any, batch: Any, *, middle: Any) -> Tensor:
        return (own() - middle()).square().sum()

    with pytest.raises(mlopt.ProblemError, match="depends on the solutions of 'inner' inside it"):
        Problem(
            Level("outer", vector(1.0), outer),
            Level("middle", vector(1.0), nested, solver=lambda own, batch: None, estimator=mlopt.Dense()),
            Level("inner", vector(1.0), inner, estimator=mlopt.Dense()),
        )


def test_a_solver_that_does_not_move_in_place_is_refused() -> None:
    def returns(model: Any, batch: Any, *, penalty: Any) -> Tensor:
        return solution(batch, penalty().detach())

    def replaces(model: Any, batch: Any, *, penalty: Any) -> None:
        model.value = nn.Parameter(solution(batch, penalty().detach()))

    def freezes(model: Any, batch: Any, *, penalty: Any) -> None:
        model.value.requires_grad_(False)

    for solver, message in {returns: "returned a Tensor", replaces: "replaced", freezes: "froze"}.items():
        with pytest.raises(mlopt.ProblemError, match=message):
            mlopt.hypergradient(ridge(solver=solver))
        with pytest.raises(mlopt.ProblemError, match=message):
            mlopt.solve(ridge(solver=solver), 1, progress=False)
