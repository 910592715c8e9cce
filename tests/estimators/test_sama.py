"""SAMA: the optimiser's step as inverse Hessian, against differentiating that step."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from core_cases import distance, drawn, gradient_of, seeds
from hypothesis import given
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

import mlopt
from mlopt.estimators.sama import step_derivative
from mlopt.testing import quadratic

OPTIMIZERS = {
    "sgd": partial(SGD, lr=0.3),
    "momentum": partial(SGD, lr=0.3, momentum=0.9),
    "nesterov": partial(SGD, lr=0.3, momentum=0.9, nesterov=True),
    # A first step of Adam is lr sign(g), but for eps: differences would not see its derivative with the usual one.
    "adam": partial(Adam, lr=0.1, eps=0.1),
    "adam_with_decay": partial(Adam, lr=0.1, betas=(0.5, 0.7), eps=0.05, weight_decay=0.2),
    "adam_with_decoupled_decay": partial(Adam, lr=0.1, eps=0.1, weight_decay=0.2, decoupled_weight_decay=True),
    "adamw": partial(AdamW, lr=0.1, eps=0.1, weight_decay=0.2),
}


def level_of(optimizer: Any) -> mlopt.Level:
    module = mlopt.variables(torch.randn(4))
    return mlopt.Level("x", module, lambda module, batch: module().square().sum(), optimizer=optimizer)


def stepped(level: mlopt.Level, gradients: list[Tensor], factory: Any) -> tuple[Tensor, Optimizer]:
    """Return where the steps along the gradients end, and the optimiser, from a copy of the level's variables."""
    variable = nn.Parameter(level.module.value.detach().clone())
    optimizer = factory([variable])
    for gradient in gradients:
        variable.grad = gradient.clone()
        optimizer.step()
    return variable.detach(), optimizer


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("name", OPTIMIZERS)
@drawn(5)
@given(seed=seeds)
def test_the_diagonal_is_the_derivative_of_the_step(name: str, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    factory = OPTIMIZERS[name]
    level = level_of(factory)
    gradients = [torch.randn(4) for _ in range(steps)]
    size = 1e-6
    above = stepped(level, [*gradients[:-1], gradients[-1] + size], factory)[0]
    below = stepped(level, [*gradients[:-1], gradients[-1] - size], factory)[0]
    live = factory(list(level.parameters))
    for gradient in gradients:
        before = level.module.value.detach().clone()
        level.module.value.grad = gradient.clone()
        live.step()
    # Adam's coupled decay is of the variables that the step began at.
    level.module.value.data.copy_(before)
    derivative = step_derivative(level, None if steps == 1 else live, [gradients[-1]])[0]
    assert distance(derivative, (below - above) / (2 * size)) < 1e-5


def test_components_that_never_had_a_gradient() -> None:
    level = level_of(partial(Adam, lr=0.1))
    derivative = step_derivative(level, None, [torch.tensor([0.0, 1.0, 0.0, 2.0])])[0]
    assert torch.isfinite(derivative).all()
    assert derivative[0] == pytest.approx(0.1 / 1e-8)  # the step is lr g / eps there


def test_with_sgd_it_is_the_identity_times_the_learning_rate() -> None:
    """Outside `solve`, where the optimiser is a fresh one."""
    case = quadratic("two", mlopt.Identity())
    x, y = case.problem["x"], case.problem["y"]
    outer = x.loss(x.module, None, y=y.module)
    direct = torch.cat([g.reshape(-1) for g in torch.autograd.grad(outer, x.parameters)])
    adapted = mlopt.Level("y", y.module, y.loss, optimizer=partial(SGD, lr=0.25), estimator=mlopt.SAMA())
    through = gradient_of(mlopt.Problem(x, adapted)) - direct
    assert distance(through, 0.25 * (gradient_of(case.problem) - direct)) < 1e-8


class Watch(mlopt.Callback):
    """Note what the outermost level's gradient was, the inner optimiser's state and the latest inner gradient."""

    def on_step_end(self, run: Any) -> None:
        engine = run.engine
        self.gradient = run.problem["u"].module.value.grad.clone()
        inner = run.problem["x"]
        self.expected = step_derivative(inner, engine.optimizers["x"], [inner.module.value.grad])[0]


def test_inside_solve_it_reads_the_live_optimiser() -> None:
    """With f = <u, x> + |x|^2 / 2 and F = <c, x>, the mixed derivative is I and the hypergradient -D c."""
    torch.manual_seed(0)
    c = torch.randn(3)

    def inner(module: nn.Module, batch: Any, *, u: nn.Module) -> Tensor:
        return u() @ module() + module().square().sum() / 2

    def outer(module: nn.Module, batch: Any, *, x: nn.Module) -> Tensor:
        return c @ x()

    problem = mlopt.Problem(
        mlopt.Level("u", mlopt.variables(torch.randn(3)), outer, optimizer=partial(SGD, lr=0.1)),
        mlopt.Level(
            "x",
            mlopt.variables(torch.randn(3)),
            inner,
            optimizer=partial(Adam, lr=0.1),
            steps=3,
            estimator=mlopt.SAMA(products="autograd"),
        ),
    )
    watch = Watch()
    mlopt.solve(problem, steps=4, callbacks=[watch], progress=False)
    assert distance(watch.gradient, -watch.expected * c) < 1e-12


def test_optimisers_whose_step_is_not_known_are_refused() -> None:
    for optimizer, sentence in [
        (partial(RMSprop, lr=0.1), "RMSprop"),
        (partial(Adam, amsgrad=True), "amsgrad"),
        (partial(SGD, lr=0.1, maximize=True), "maximize"),
        (partial(SGD, lr=0.1, momentum=0.9, dampening=0.4), "dampening"),
    ]:
        with pytest.raises(mlopt.EstimatorError, match=f"level 'x': .*{sentence}"):
            step_derivative(level_of(optimizer), None, [torch.ones(4)])
    with pytest.raises(mlopt.EstimatorError, match="optimizer=None"):
        step_derivative(level_of(None), None, [torch.ones(4)])


def test_outside_solve_an_optimiser_that_has_stepped_counts_as_fresh() -> None:
    level = level_of(None)
    optimizer = Adam(level.parameters, lr=0.1, eps=0.1)
    held = mlopt.Level("x", level.module, lambda module, batch: module().square().sum(), optimizer=optimizer)
    gradient = torch.randn(4)
    fresh = step_derivative(held, None, [gradient])[0]
    level.module.value.grad = torch.randn(4)
    optimizer.step()
    assert torch.equal(step_derivative(held, None, [gradient])[0], fresh)
    assert not torch.allclose(step_derivative(held, optimizer, [gradient])[0], fresh)


def test_a_level_with_levels_inside_is_refused() -> None:
    optimizer = partial(SGD, lr=0.1)
    case = quadratic("nested", {"y": mlopt.SAMA(), "z": mlopt.Dense()})
    levels = [
        mlopt.Level(level.name, level.module, level.loss, optimizer=optimizer, estimator=level.estimator)
        for level in case.problem
    ]
    with pytest.raises(mlopt.EstimatorError, match="level 'y': SAMA is for levels without levels inside, and 'z'"):
        mlopt.hypergradient(mlopt.Problem(*levels))


SCHEDULERS: dict[str, tuple[Any, int]] = {
    "decay": (partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.1), 3),
    "cycle": (partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.3, total_steps=10), 4),
}


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_step_is_that_before_the_scheduler_moved_on(name: str, tensor: bool) -> None:
    """OneCycleLR changes the first beta of Adam too."""
    scheduler, steps = SCHEDULERS[name]
    seen: list[Tensor] = []

    class Note(mlopt.Callback):
        def on_step_end(self, run: Any) -> None:
            seen.append(run.problem["u"].module.value.grad.clone())

    def inner(module: nn.Module, batch: Any, *, u: nn.Module) -> Tensor:
        return u() @ module() + module().square().sum() / 2

    def outer(module: nn.Module, batch: Any, *, x: nn.Module) -> Tensor:
        return x().sum()

    def adam(parameters: Any) -> Optimizer:
        return Adam(parameters, lr=torch.tensor(0.1) if tensor else 0.1, eps=0.1)

    start = torch.tensor([0.5, -1.0, 2.0])
    problem = mlopt.Problem(
        mlopt.Level("u", mlopt.variables(torch.ones(3)), outer, optimizer=partial(SGD, lr=0.0)),
        mlopt.Level(
            "x",
            mlopt.variables(start),
            inner,
            optimizer=adam,
            scheduler=scheduler,
            estimator=mlopt.SAMA(products="autograd"),
        ),
    )
    mlopt.solve(problem, steps=steps, callbacks=[Note()], progress=False)

    def end(shift: Tensor) -> Tensor:
        """Return x after the steps, the last one along a gradient that is shifted."""
        x = nn.Parameter(start.clone())
        optimizer = adam([x])
        rates = scheduler(optimizer)
        for step in range(steps):
            x.grad = 1.0 + x.detach() + (shift if step == steps - 1 else 0.0)
            optimizer.step()
            rates.step()
        return x.detach()

    size = 1e-6
    expected = (end(torch.full((3,), size)) - end(torch.full((3,), -size))) / (2 * size)
    # Rounding of a step of 0.01 over a displacement of 1e-6, relative to a derivative of 1e-5.
    assert distance(seen[-1], expected) < 1e-4


@pytest.mark.filterwarnings("ignore::mlopt.TrustWarning")
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("products", ["autograd", "finite_difference"])
def test_half_precision_agrees_with_single(products: str, clip: float | None) -> None:
    def gradient(dtype: torch.dtype) -> Tensor:
        torch.manual_seed(0)
        start, weights = torch.randn(3).to(torch.bfloat16).to(dtype), torch.tensor([0.5, -1.0, 2.0], dtype=dtype)

        def inner(module: nn.Module, batch: Any, *, u: nn.Module) -> Tensor:
            return u() @ module() + module().square().sum() / 2

        problem = mlopt.Problem(
            mlopt.Level(
                "u",
                mlopt.variables(torch.ones(3, dtype=dtype)),
                lambda module, batch, *, x: weights @ x(),
                optimizer=partial(SGD, lr=0.0),
            ),
            mlopt.Level(
                "x",
                mlopt.variables(start),
                inner,
                optimizer=partial(Adam, lr=0.125, eps=0.125),
                clip=clip,
                estimator=mlopt.SAMA(products=products),
            ),
        )
        mlopt.solve(problem, steps=1, callbacks=[mlopt.Callback()], progress=False)
        return problem["u"].module.value.grad.double()

    assert distance(gradient(torch.bfloat16), gradient(torch.float32)) < 0.05  # bfloat16 has 8 bits


def test_a_resumed_run_knows_the_rates_of_the_step_before(tmp_path: Path) -> None:
    """A step that is skipped right after the checkpoint leaves them to the pullback."""
    seen: list[Any] = []

    class Note(mlopt.Callback):
        def on_train_begin(self, run: Any) -> None:
            seen.append([dict(group) for group in run.engine.gradients.carryover.groups.get("x", [])])

    def run(steps: int, *, resume: bool) -> None:
        problem = mlopt.Problem(
            mlopt.Level(
                "u", mlopt.variables(torch.ones(3)), lambda u, batch, *, x: x().sum(), optimizer=partial(SGD, lr=0.1)
            ),
            mlopt.Level(
                "x",
                mlopt.variables(torch.ones(3)),
                lambda x, batch, *, u: (x() - u()).square().sum(),
                optimizer=partial(SGD, lr=0.5),
                scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
                estimator=mlopt.SAMA(),
            ),
        )
        saving = mlopt.Checkpoints(tmp_path, every=1)
        mlopt.solve(problem, steps, checkpoint=saving, resume=resume, callbacks=[Note()], progress=False)

    run(2, resume=False)
    run(3, resume=True)
    assert seen[0] == []
    assert [group["lr"] for group in seen[1]] == [0.25]
