"""The point at which an optimiser's steps end: decay and `maximize` against closed forms and long loops."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

import mlopt

F64 = torch.float64
DECAY = 0.7
GENERATOR = torch.Generator().manual_seed(0)
A, B, C, D, OUTER = (
    torch.randn(*shape, generator=GENERATOR, dtype=F64) for shape in ((20, 4), (20,), (10, 4), (10,), (4,))
)
HESSIAN = A.T @ A / 20 + 0.3 * torch.eye(4, dtype=F64)
EXACT = [
    mlopt.Dense(),
    mlopt.ConjugateGradient(products="forward"),
    mlopt.ConjugateGradient(products="finite_difference"),
    mlopt.MINRES(products="gauss_newton"),
    mlopt.ValueFunction(steps=300),
]


def ridge(model: Any, batch: Any, *, outer: Any) -> Tensor:
    fit = (A @ model() - B).square().mean() / 2 + 0.15 * model().square().sum()
    return fit - model() @ outer() if batch is None else fit - model() @ outer() + batch @ model()


def held_out(outer: Any, batch: Any, *, model: Any) -> Tensor:
    return (C @ model() - D).square().mean()


def solution(outer: Tensor, diagonal: Tensor | float) -> Tensor:
    """The closed form for the decay sum_i d_i x_i^2 / 2."""
    matrix = HESSIAN + torch.diag(torch.as_tensor(diagonal, dtype=F64).expand(4))
    return torch.linalg.solve(matrix, A.T @ B / 20 + outer)


def expected(diagonal: Tensor | float = DECAY) -> Tensor:
    outer = OUTER.clone().requires_grad_()
    return torch.autograd.grad((C @ solution(outer, diagonal) - D).square().mean(), outer)[0]


def build(optimizer: Any, estimator: mlopt.Estimator, x: Tensor | None = None, loss: Any = ridge) -> mlopt.Problem:
    start = solution(OUTER, DECAY) if x is None else x
    return mlopt.Problem(
        mlopt.Level("outer", mlopt.variables(OUTER), held_out, optimizer=partial(SGD, lr=0.0)),
        mlopt.Level("model", mlopt.variables(start), loss, optimizer=optimizer, steps=5, estimator=estimator),
    )


def distance(result: mlopt.Hypergradient, reference: Tensor) -> float:
    return float((result.gradient["value"] - reference).norm() / reference.norm())


class PlainDecay(Optimizer):
    """A user's SGD with decoupled decay."""

    def __init__(self, parameters: Any, *, power: int = 1) -> None:
        super().__init__(parameters, {"lr": 0.1, "power": power})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(1 - group["lr"] * DECAY * p.data.abs() ** (group["power"] - 1)).sub_(group["lr"] * p.grad)


COUPLED: dict[str, Callable[..., Optimizer]] = {
    "sgd": partial(SGD, lr=0.1, weight_decay=DECAY, momentum=0.9),
    "adam": partial(Adam, lr=0.1, weight_decay=DECAY),
    "nadam": partial(NAdam, lr=0.1, weight_decay=DECAY),
    "radam": partial(RAdam, lr=0.1, weight_decay=DECAY),
    "rmsprop": partial(RMSprop, lr=0.1, weight_decay=DECAY),
    "adagrad": partial(Adagrad, lr=0.1, weight_decay=DECAY),
    "adadelta": partial(Adadelta, lr=0.1, weight_decay=DECAY),
    "adamax": partial(Adamax, lr=0.1, weight_decay=DECAY),
    "asgd": partial(torch.optim.ASGD, lr=0.1, weight_decay=0.5, lambd=0.2),
    "own": PlainDecay,
}


@pytest.mark.parametrize("optimizer", COUPLED.values(), ids=COUPLED)
def test_coupled_decay_is_a_term_of_the_objective(optimizer: Any) -> None:
    result = mlopt.hypergradient(build(optimizer, mlopt.Dense()))
    assert distance(result, expected()) < 1e-12
    assert result.reports["model"].stationarity < 1e-12  # type: ignore[operator]


@pytest.mark.parametrize("estimator", EXACT, ids=str)
def test_every_solver_and_every_kind_of_products_sees_the_decay(estimator: mlopt.Estimator) -> None:
    result = mlopt.hypergradient(build(COUPLED["sgd"], estimator))
    assert distance(result, expected()) < 1e-8


@pytest.mark.parametrize("estimator", EXACT, ids=str)
def test_a_level_that_maximises_is_one_that_minimises_the_negative(estimator: mlopt.Estimator) -> None:
    def negative(model: Any, batch: Any, *, outer: Any) -> Tensor:
        return -ridge(model, batch, outer=outer)

    problem = build(partial(SGD, lr=0.1, weight_decay=DECAY, maximize=True), estimator, loss=negative)
    assert distance(mlopt.hypergradient(problem), expected()) < 1e-8
    problem = build(partial(Adam, lr=0.1, maximize=True), mlopt.Identity(), loss=negative)
    plain = build(partial(Adam, lr=0.1), mlopt.Identity())
    assert distance(mlopt.hypergradient(problem), mlopt.hypergradient(plain).gradient["value"]) < 1e-12


def test_the_closed_form_is_where_the_steps_end() -> None:
    problem = build(partial(SGD, lr=0.3, weight_decay=DECAY), mlopt.Dense(), torch.zeros(4, dtype=F64))
    run = mlopt.solve(problem, 100, progress=False)
    assert torch.allclose(problem["model"].parameters[0], solution(OUTER, DECAY), rtol=1e-10)
    report = run.reports["model"]
    assert report.converged
    assert report.stationarity < 1e-8  # type: ignore[operator]
    assert float((problem["outer"].parameters[0].grad - expected()).norm()) < 1e-8  # type: ignore[operator]


@pytest.mark.parametrize(
    "optimizer", [partial(SGD, lr=0.1), partial(SGD, lr=0.1, momentum=0.9)], ids=["sgd", "momentum"]
)
def test_decay_that_a_clipped_gradient_cannot_balance_is_doubtful(optimizer: Any) -> None:
    """With a wider clip the same steps end at the closed form, and nothing is in doubt."""
    size = float((DECAY * solution(OUTER, DECAY)).norm())
    for clip, doubtful in ((0.5 * size, True), (1.1 * size, False)):
        problem = build(partial(optimizer, weight_decay=DECAY), mlopt.Dense())
        level = attrs.evolve(problem["model"], clip=clip)
        problem = mlopt.Problem(problem["outer"], level)
        with pytest.warns(mlopt.TrustWarning, match="raise clip") if doubtful else pytest.MonkeyPatch.context():
            run = mlopt.solve(problem, 200, progress=False)
        assert run.reports["model"].doubtful == doubtful
        off = float((level.parameters[0].detach() - solution(OUTER, DECAY)).norm() / solution(OUTER, DECAY).norm())
        assert off > 0.1 if doubtful else off < 1e-8


def test_unrolled_steps_do_not_count_the_decay_twice() -> None:
    pytest.importorskip("torchopt")
    problem = build(partial(SGD, lr=0.3, weight_decay=DECAY), mlopt.Unrolled(steps=300))
    assert distance(mlopt.hypergradient(problem), expected()) < 1e-8


def test_softmax_regression_with_a_small_decay() -> None:
    """Solved by Newton's method at displaced outer variables."""
    generator = torch.Generator().manual_seed(1)
    inputs, labels = torch.randn(30, 3, generator=generator, dtype=F64), torch.randint(3, (30,), generator=generator)
    validation = torch.randn(30, 3, generator=generator, dtype=F64), torch.randint(3, (30,), generator=generator)

    def loss(w: Tensor, u: Tensor) -> Tensor:
        losses = nn.functional.cross_entropy(inputs @ w.reshape(3, 3), labels, reduction="none")
        return (u.sigmoid() * losses).mean()

    def newton(u: Tensor) -> Tensor:
        w = torch.zeros(9, dtype=F64)
        for _ in range(6):
            gradient = torch.func.grad(loss)(w, u) + 0.05 * w
            w = w - torch.linalg.solve(torch.func.hessian(loss)(w, u) + 0.05 * torch.eye(9, dtype=F64), gradient)
        return w

    def outer_value(u: Tensor) -> Tensor:
        return nn.functional.cross_entropy(validation[0] @ newton(u).reshape(3, 3), validation[1])

    u = torch.randn(30, generator=generator, dtype=F64)
    h = 1e-5 * torch.eye(30, dtype=F64)
    reference = torch.stack([(outer_value(u + e) - outer_value(u - e)) / 2e-5 for e in h])
    problem = mlopt.Problem(
        mlopt.Level(
            "u",
            mlopt.variables(u),
            lambda own, batch, *, w: nn.functional.cross_entropy(validation[0] @ w().reshape(3, 3), validation[1]),
        ),
        mlopt.Level(
            "w",
            mlopt.variables(newton(u)),
            lambda own, batch, *, u: loss(own(), u()),
            optimizer=partial(SGD, lr=1.0, weight_decay=0.05),
            estimator=mlopt.Dense(),
        ),
    )
    assert distance(mlopt.hypergradient(problem), reference) < 1e-7
    assert mlopt.check_hypergradient(problem, oracle="resolve", tolerance=1e-5).error < 1e-5
    assert mlopt.diagnose(problem).safe


@pytest.mark.parametrize("maximize", [False, True])
def test_each_group_has_a_decay_and_a_sign_of_its_own(maximize: bool) -> None:
    """Signs differ: f falls in the first half and rises in the second, f = (x0 - u0)^2 / 2 - (x1 - u1)^2 / 2."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.full((2,), v, dtype=F64)) for v in (0.2, -0.1))

    def loss(model: Any, batch: Any, *, outer: Any) -> Tensor:
        u, sign = outer(), -1.0 if maximize else 1.0
        return ((model.a - u[:2]).square().sum() + sign * (model.b - u[2:]).square().sum()) / 2

    def top(outer: Any, batch: Any, *, model: Any) -> Tensor:
        return model.a.sum() + model.b.sum()

    def groups(parameters: Any) -> Optimizer:
        a, b = parameters
        return SGD(
            [{"params": [a], "weight_decay": 1.0}, {"params": [b], "weight_decay": 3.0, "maximize": maximize}], lr=0.1
        )

    problem = mlopt.Problem(
        mlopt.Level("outer", mlopt.variables(OUTER), top),
        mlopt.Level("model", Halves(), loss, optimizer=groups, estimator=mlopt.MINRES()),
    )
    result = mlopt.hypergradient(problem)
    assert distance(result, torch.tensor([0.5, 0.5, 0.25, 0.25], dtype=F64)) < 1e-12
    assert result.reports["model"].gradient_norm == pytest.approx(
        float(((torch.tensor([0.4, 0.4, -0.4, -0.4], dtype=F64) - OUTER) ** 2).sum().sqrt()), rel=1e-12
    )


def test_nested_levels_that_decay() -> None:
    """z* = y / (1 + a), y* = argmin (y - u)^2 / 2 + (z* - 1)^2 / 2 + b y^2 / 2, and the outer loss is y + z*."""
    a, b = 0.5, 2.0

    def level(name: str, value: float, loss: Any, decay: float = 0.0, **options: Any) -> mlopt.Level:
        module = mlopt.variables(torch.tensor([value], dtype=F64))
        return mlopt.Level(name, module, loss, optimizer=partial(SGD, lr=0.2, weight_decay=decay), **options)

    def inner(z: Any, batch: Any, *, y: Any) -> Tensor:
        return (z() - y()).square().sum() / 2

    def middle(y: Any, batch: Any, *, u: Any, z: Any) -> Tensor:
        return ((y() - u()).square().sum() + (z() - 1).square().sum()) / 2

    def outer(u: Any, batch: Any, *, y: Any, z: Any) -> Tensor:
        return (y() + z()).sum()

    share = 1 / (1 + a)
    bend = 1 + b + share**2
    y = (0.8 + share) / bend
    for rule in (mlopt.Dense(), mlopt.ConjugateGradient(products="forward")):
        problem = mlopt.Problem(
            level("u", 0.8, outer),
            level("y", y, middle, b, estimator=rule),
            level("z", share * y, inner, a, estimator=rule),
        )
        result = mlopt.hypergradient(problem)
        assert distance(result, torch.tensor([(1 + share) / bend], dtype=F64)) < 1e-12
        assert all(report.stationarity < 1e-12 for report in result.reports.values())  # type: ignore[operator]
    assert mlopt.check_hypergradient(problem, oracle="resolve", tolerance=1e-6).error < 1e-6


def test_decoupled_decay_is_scaled_by_the_second_moments() -> None:
    """Two batches that pull to both sides keep the second moments nearly constant, as the noise of small batches does."""
    noise = torch.tensor([6.0, 3.0, 5.0, 4.0], dtype=F64)
    decay, second = 0.3, 0.9999

    def run(outer: Tensor, steps: int) -> tuple[nn.Parameter, Optimizer]:
        x = nn.Parameter(solution(outer, decay * noise))
        optimizer = AdamW([x], lr=1e-3, weight_decay=decay, betas=(0.9, second))
        for k in range(steps):
            x.grad = HESSIAN @ x.detach() - A.T @ B / 20 - outer + (1 if k % 2 else -1) * noise
            optimizer.step()
        return x, optimizer

    x, optimizer = run(OUTER, 20_000)
    model = mlopt.variables(x.detach())
    model.value = x
    problem = mlopt.Problem(
        mlopt.Level("outer", mlopt.variables(OUTER), held_out),
        mlopt.Level("model", model, ridge, optimizer=optimizer, estimator=mlopt.ConjugateGradient()),
    )
    result = mlopt.hypergradient(problem)
    moments = (optimizer.state[x]["exp_avg_sq"] / (1 - second**20_000)).sqrt() + 1e-8
    assert distance(result, expected(decay * moments)) < 1e-3  # the variables swing by a step
    assert result.reports["model"].stationarity < 1e-3  # type: ignore[operator]
    assert mlopt.check_hypergradient(problem, oracle="resolve", tolerance=5e-3).error < 5e-3
    # The loop itself, along one direction. Its second moments grow with the gradient, by a few per cent.
    direction = torch.tensor([0.5, -0.5, 0.5, 0.5], dtype=F64)
    ends = [(C @ run(OUTER + h * direction, 20_000)[0].detach() - D).square().mean() for h in (0.05, -0.05)]
    loop = float(ends[0] - ends[1]) / 0.1
    assert float(result.gradient["value"] @ direction) == pytest.approx(loop, rel=0.05)
    assert float(expected(0.0) @ direction) != pytest.approx(loop, rel=0.3)


def test_decoupled_decay_without_state_is_doubtful() -> None:
    decaying = partial(AdamW, lr=0.1, weight_decay=0.3)
    with pytest.warns(mlopt.TrustWarning, match=r"decoupled weight_decay=0.3 of AdamW is left out"):
        report = mlopt.hypergradient(build(decaying, mlopt.ConjugateGradient())).reports["model"]
    assert report.doubtful
    diagnosis = mlopt.diagnose(build(decaying, mlopt.ConjugateGradient()))
    assert not diagnosis.safe
    far = build(decaying, mlopt.ConjugateGradient(), torch.ones(4, dtype=F64))
    with pytest.warns(mlopt.TrustWarning), pytest.raises(mlopt.DisagreementError, match="weight_decay") as raised:
        mlopt.check_hypergradient(far, oracle="resolve")
    assert "more steps" not in str(raised.value)
    # An assumed inverse holds no decay.
    for rule in (mlopt.Identity(), mlopt.FiniteDifference()):
        assert not mlopt.hypergradient(build(decaying, rule)).reports["model"].doubtful
    assert not mlopt.hypergradient(build(partial(AdamW, weight_decay=0.0), EXACT[0])).reports["model"].doubtful


def test_second_moments_that_follow_the_gradient_are_doubtful() -> None:
    """Without noise AdamW ends where |x| nears 1 / weight_decay, and its second moments are the gradient's square."""
    problem = build(partial(AdamW, lr=0.05, weight_decay=20.0), mlopt.Dense(), torch.zeros(4, dtype=F64))
    with pytest.warns(mlopt.TrustWarning, match="second moments of the optimiser"):
        mlopt.solve(problem, 400, progress=False)


def test_an_unknown_decay_is_doubtful_and_an_unknown_optimizer_without_decay_is_not() -> None:
    with pytest.warns(mlopt.TrustWarning, match="the decay of PlainDecay is left out"):
        mlopt.hypergradient(build(partial(PlainDecay, power=3), mlopt.Dense()))

    class Rising(Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                p.data.add_(p.grad.sign())

    result = mlopt.hypergradient(build(Rising, mlopt.Identity()))
    plain = mlopt.hypergradient(build(None, mlopt.Identity()))
    assert distance(result, -plain.gradient["value"]) < 1e-12


def test_reading_an_optimizer_changes_nothing() -> None:
    x = mlopt.variables(OUTER)
    optimizer = PlainDecay(x.parameters())
    optimizer.state[x.value]["count"] = 3
    x.value.grad = torch.ones(4, dtype=F64)
    problem = mlopt.Problem(
        mlopt.Level("outer", mlopt.variables(OUTER), held_out),
        mlopt.Level("model", x, ridge, optimizer=optimizer, estimator=mlopt.Dense()),
    )
    mlopt.hypergradient(problem)
    assert torch.equal(x.value.detach(), OUTER)
    assert x.value.grad.eq(1).all()
    assert optimizer.state[x.value] == {"count": 3}
