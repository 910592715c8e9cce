"""Clipped steps: rules that use the steps of an optimiser differentiate through the clipping of their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from core_cases import distance, flat
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import mlopt
from mlopt.solving.callbacks import Callback

RATE, CLIP = 0.1, 0.7
#: A step of each optimiser from (g, t, state), and the new state: written out, to be differentiated.
Step = Callable[[Tensor, int, Tensor], tuple[Tensor, Tensor]]


def plain_step(g: Tensor, t: int, state: Tensor) -> tuple[Tensor, Tensor]:
    return RATE * g, state


def momentum_step(g: Tensor, t: int, state: Tensor) -> tuple[Tensor, Tensor]:
    state = 0.9 * state + g
    return RATE * state, state


def adam_step(g: Tensor, t: int, state: Tensor) -> tuple[Tensor, Tensor]:
    mean, square = 0.9 * state[0] + 0.1 * g, 0.99 * state[1] + 0.01 * g * g
    corrected = mean / (1 - 0.9**t), square / (1 - 0.99**t)
    return RATE * corrected[0] / (corrected[1].sqrt() + 1e-8), torch.stack([mean, square])


STEPS: dict[str, tuple[Callable[..., Optimizer], Step]] = {
    "sgd": (partial(SGD, lr=RATE), plain_step),
    "momentum": (partial(SGD, lr=RATE, momentum=0.9), momentum_step),
    "adam": (partial(Adam, lr=RATE, betas=(0.9, 0.99)), adam_step),
}


class Pair(nn.Module):
    """Two tensors: clipping uses the norm of both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.tensor([[0.5]]))

    def forward(self) -> Tensor:
        return torch.cat([self.first, self.second.reshape(1)])


SCALES = torch.tensor([3.0, 1.0, 0.2])


def inner_value(x: Tensor, u: Tensor) -> Tensor:
    return (SCALES * (x - u).pow(2)).sum() + (x * u).pow(3).sum() / 30


def outer_value(x: Tensor) -> Tensor:
    return (x - 0.3).square().sum() + x.prod()


def inner(module: nn.Module, batch: None, *, outer: nn.Module) -> Tensor:
    return inner_value(module(), outer())


def outer(module: nn.Module, batch: None, *, inner: nn.Module) -> Tensor:
    return outer_value(inner())


def build(estimator: mlopt.Estimator, optimizer: Any, clip: float | None, **options: Any) -> mlopt.Problem:
    start = mlopt.variables(torch.tensor([0.2, 1.0, -1.0]))
    return mlopt.Problem(
        mlopt.Level("outer", start, outer, optimizer=partial(SGD, lr=0.0)),
        mlopt.Level("inner", Pair(), inner, optimizer=optimizer, clip=clip, estimator=estimator, **options),
    )


def clipped(g: Tensor, clip: float) -> Tensor:
    return g * (clip / (g.norm() + 1e-6)).clamp(max=1.0)


def unrolled_by_hand(step: Step, steps: int, clip: float, problem: mlopt.Problem) -> tuple[Tensor, Tensor, int]:
    """Return the outer objective after the steps, its derivative, and the number of clipped steps."""
    u = problem["outer"].module.value.detach().requires_grad_()
    x, state, count = problem["inner"].module().detach().requires_grad_(), torch.zeros(2, 3), 0
    for t in range(1, steps + 1):
        (g,) = torch.autograd.grad(inner_value(x, u), x, create_graph=True)
        count += int(g.norm() > clip)
        moved, state = step(clipped(g, clip), t, state)
        x = x - (moved if moved.dim() == 1 else moved[0])
    value = outer_value(x)
    return value.detach(), torch.autograd.grad(value, u)[0], count


@pytest.mark.parametrize("products", ["autograd", "forward"])
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("every", [1, 3])
def test_unrolled_steps_are_clipped_and_differentiated_as_such(name: str, products: str, every: int) -> None:
    optimizer, step = STEPS[name]
    problem = build(mlopt.Unrolled(steps=12, checkpoint_every=every, products=products), optimizer, CLIP)
    result = mlopt.hypergradient(problem)
    value, expected, count = unrolled_by_hand(step, 12, CLIP, problem)
    assert count >= 3
    assert float(result.loss) == pytest.approx(float(value), rel=1e-12)
    assert distance(flat(result.gradient), expected) < 1e-10


def test_virtual_steps_end_where_the_real_ones_do() -> None:
    problem = build(mlopt.Unrolled(steps=5), partial(SGD, lr=RATE, momentum=0.9), CLIP)
    virtual = mlopt.hypergradient(problem).loss
    module, u = problem["inner"].module, problem["outer"].module()
    optimizer = SGD(module.parameters(), lr=RATE, momentum=0.9)
    for _ in range(5):
        optimizer.zero_grad()
        inner_value(module(), u.detach()).backward()
        nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
    assert float(virtual) == pytest.approx(float(outer_value(module()).detach()), rel=1e-12)


@pytest.mark.parametrize("clip", [CLIP, 1e6])
@pytest.mark.parametrize("optimizer", [partial(SGD, lr=RATE), partial(Adam, lr=RATE, eps=0.3)], ids=["sgd", "adam"])
@pytest.mark.parametrize("inside", [False, True])
def test_sama_is_the_derivative_of_a_clipped_step(clip: float, optimizer: Any, inside: bool) -> None:
    """u_bar = -(d2f / du dx) (d step / d g)^T v, with the step's derivative by automatic differentiation."""
    problem = build(mlopt.SAMA(products="autograd"), optimizer, clip)
    module, u = problem["inner"].module, problem["outer"].module.value.detach().requires_grad_()
    at = module().detach()
    gradient = torch.autograd.grad(inner_value(x := at.clone().requires_grad_(), u.detach()), x)[0]

    def step(g: Tensor) -> Tensor:
        g = clipped(g, clip)
        return RATE * g if optimizer.func is SGD else RATE * g / (g.square().sqrt() + 0.3)

    derivative = torch.autograd.functional.jacobian(step, gradient)
    if inside:
        gradients: list[Tensor] = []

        class Watch(Callback):
            def on_step_end(self, run: Any) -> None:
                gradients.append(problem["outer"].module.value.grad.clone())

        mlopt.solve(problem, 1, progress=False, callbacks=[Watch()])
        at, actual = module().detach(), gradients[0]
    else:
        actual = flat(mlopt.hypergradient(problem).gradient)
    x = at.clone().requires_grad_()
    (v,) = torch.autograd.grad(outer_value(x), x)
    (slope,) = torch.autograd.grad(inner_value(x, u), x, create_graph=True)
    (expected,) = torch.autograd.grad(slope, u, grad_outputs=-(derivative.T @ v))
    assert math.isclose(float(gradient.norm()) > clip, clip == CLIP)
    assert distance(actual, expected) < 1e-9


def test_a_step_that_the_loss_scaler_skips_has_no_derivative() -> None:
    """The first scaled gradient overflows: Adam has no state, and the derivative was lr / eps."""

    def steep(module: nn.Module, batch: None, *, outer: nn.Module) -> Tensor:
        return 1e35 * inner_value(module(), outer()).float()

    gradients: list[Tensor] = []

    class Watch(Callback):
        def on_step_end(self, run: Any) -> None:
            gradients.append(problem["outer"].module.value.grad.clone())
            assert not run.engine.optimizers["inner"].state

    level = mlopt.Level(
        "inner",
        Pair(),
        steep,
        optimizer=partial(Adam, lr=RATE),
        precision="fp16",
        estimator=mlopt.SAMA(products="autograd"),
    )
    problem = mlopt.Problem(build(mlopt.Identity(), None, None)["outer"], level)
    mlopt.solve(problem, 1, progress=False, callbacks=[Watch()])
    assert torch.equal(gradients[0], torch.zeros(3))
