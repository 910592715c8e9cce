"""Levels over tasks: equal to a level for each task, and to closed forms."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from core_cases import distance, drawn, gradient_of, seeds
from hypothesis import given
from torch import Tensor, nn
from torch.optim import SGD

import mlopt
from mlopt.testing import same, snapshot

GAMMA = 2.0


def support(net: nn.Module, batch: Any) -> Tensor:
    return (net(batch["x"]).squeeze(-1) - batch["y"]).square().sum() / 2


def proximal(net: nn.Module, *, meta: nn.Module) -> Tensor:
    pairs = zip(net.parameters(), meta.parameters(), strict=True)
    return GAMMA / 2 * torch.stack([(p - q).square().sum() for p, q in pairs]).sum()


def query(meta: nn.Module, batch: Any, *, net: nn.Module) -> Any:
    loss = (net(batch["x"]).squeeze(-1) - batch["y"]).square().sum() / 2
    return {"loss": loss, "error": loss.detach().sqrt()}


def draw(tasks: int, seed: int, features: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (tasks, 7, features), "y": (tasks, 7)}
    return {"name": "drawn", **{key: torch.randn(*shape, generator=generator) for key, shape in shapes.items()}}


def entry(batch: dict[str, Any], task: int) -> dict[str, Any]:
    return {key: value[task] if isinstance(value, Tensor) else value for key, value in batch.items()}


def together(meta: nn.Module, tasks: int, batches: Any, rule: mlopt.Estimator, loss: Any = support) -> mlopt.Problem:
    net = partial(mlopt.Level, "net", mlopt.stacked(meta, tasks), mlopt.over_tasks(loss), data=[batches[0]])
    return mlopt.Problem(
        mlopt.Level("meta", meta, mlopt.over_tasks(query), data=[batches[1]], optimizer=partial(SGD, lr=0.1)),
        net(regularizer=mlopt.over_tasks(proximal), estimator=rule, optimizer=partial(SGD, lr=0.01)),
    )


def apart(meta: nn.Module, tasks: mlopt.Stacked, batches: Any, rule: mlopt.Estimator) -> mlopt.Problem:
    """Return the same problem with a level for each task."""
    names = [f"net{t}" for t in range(tasks.copies)]
    # The graph is read off the signature, so the function is made for these names.
    source = f"lambda meta, batch, *, {', '.join(names)}: total(meta, batch, [{', '.join(names)}])"

    def total(meta: nn.Module, batch: Any, nets: list[nn.Module]) -> Tensor:
        return torch.stack([query(meta, entry(batch, t), net=net)["loss"] for t, net in enumerate(nets)]).sum()

    levels = [
        mlopt.Level(name, tasks.task(t), support, data=[entry(batches[0], t)], regularizer=proximal, estimator=rule)
        for t, name in enumerate(names)
    ]
    return mlopt.Problem(mlopt.Level("meta", meta, eval(source, {"total": total}), data=[batches[1]]), *levels)


def scattered(problem: mlopt.Problem, seed: int) -> mlopt.Stacked:
    """Move the tasks apart; return their module."""
    module, generator = problem["net"].module, torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return module


@drawn(5)
@given(seed=seeds)
def test_imaml_on_32_tasks_equals_the_closed_form_and_32_levels(seed: int) -> None:
    """With H_t = A_t^T A_t + gamma I and x_t the solution, the gradient is gamma sum_t H_t^-1 C_t^T (C_t x_t - d_t)."""
    torch.manual_seed(seed)
    meta, batches = nn.Linear(3, 1, bias=False), [draw(32, seed + k) for k in range(2)]
    rule = mlopt.ConjugateGradient(iterations=200, rtol=1e-13)
    problem = together(meta, 32, batches, rule)
    (a, b), (c, d) = ((batch["x"], batch["y"][..., None]) for batch in batches)
    h, u = a.mT @ a + GAMMA * torch.eye(3), meta.weight.detach()
    x = torch.linalg.solve(h, a.mT @ b + GAMMA * u.mT)
    with torch.no_grad():
        problem["net"].module.module.weight.copy_(x.mT)
    exact = GAMMA * torch.linalg.solve(h, c.mT @ (c @ x - d)).sum(0)
    value = gradient_of(problem)
    assert distance(value, exact[:, 0]) < 1e-8
    assert mlopt.check_hypergradient(problem, tolerance=1e-8).error < 1e-8
    assert distance(value, gradient_of(apart(meta, problem["net"].module, batches, rule))) < 1e-10


@pytest.mark.parametrize("products", ["autograd", "forward", "finite_difference"])
@drawn(3)
@given(seed=seeds)
def test_networks_equal_a_level_for_each_task(products: str, seed: int) -> None:
    torch.manual_seed(seed)
    meta, batches = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)), [draw(3, seed + k) for k in range(2)]
    rule = mlopt.Dense(products=products, damping=20.0)
    problem = together(meta, 3, batches, rule)
    tasks = scattered(problem, seed)
    expected = gradient_of(apart(meta, tasks, batches, mlopt.Dense(damping=20.0)))
    assert distance(gradient_of(problem), expected) < (1e-6 if products == "finite_difference" else 1e-10)


def test_a_run_steps_every_task_as_a_run_of_its_own() -> None:
    torch.manual_seed(0)
    meta, batches = nn.Linear(3, 1), [draw(4, k) for k in range(2)]
    problem = together(meta, 4, batches, mlopt.Dense())
    start = [p.detach().clone() for p in meta.parameters()]
    solution = mlopt.solve(problem, 1, seed=0, progress=False)
    for task in range(4):
        net = nn.Linear(3, 1)
        with torch.no_grad():
            for p, value in zip(net.parameters(), start, strict=True):
                p.copy_(value)
        loss = support(net, entry(batches[0], task))
        loss.backward()
        for p, after in zip(net.parameters(), problem["net"].module.task(task).parameters(), strict=True):
            torch.testing.assert_close(after, p.detach() - 0.01 * p.grad, check_stride=False)
    logged = [query(meta, entry(batches[1], t), net=problem["net"].module.task(t))["error"] for t in range(4)]
    assert solution.history[0]["meta/error"] == pytest.approx(float(torch.stack(logged).mean()))


def test_random_numbers_differ_by_task_and_are_common_to_a_pullback() -> None:
    masks = []

    def noisy(net: nn.Module, batch: Any) -> Tensor:
        drawn = nn.functional.dropout(torch.ones(3), 0.5)
        masks.append(torch._C._functorch.get_unwrapped(drawn).detach().clone())
        return (net(batch["x"] * drawn).squeeze(-1) - batch["y"]).square().sum()

    problem = together(nn.Linear(3, 1), 8, [draw(8, k) for k in range(2)], mlopt.ConjugateGradient(), noisy)
    before = snapshot(problem)
    result = mlopt.hypergradient(problem)
    assert same(before, snapshot(problem))
    assert masks[0].shape == (8, 3)
    assert len(masks[0].unique(dim=0)) > 1
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert not result.reports["net"].remarks


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.second(self.first(inputs)) * self.frozen).sum(-1)


def test_tied_and_frozen_parameters_remain_so() -> None:
    stack = mlopt.stacked(Tied(), 2)
    assert stack.module.second.weight is stack.module.first.weight
    assert [p.requires_grad for p in stack.parameters()] == [False, True]
    with torch.no_grad():
        stack.module.first.weight.mul_(torch.tensor([1.0, 2.0])[:, None, None])
    inputs = torch.randn(2, 5, 3)
    value = mlopt.over_tasks(lambda net, batch: net(batch).sum())(stack, inputs)
    one, other = (stack.task(k) for k in range(2))
    assert other.second.weight is other.first.weight
    torch.testing.assert_close(value, one(inputs[0]).sum() + other(inputs[1]).sum())


def test_running_statistics_that_stay_are_shared_by_the_tasks() -> None:
    """Values, gradients and second-order products are those of BatchNorm written by hand for each task."""
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))
    net(torch.randn(50, 3))
    stack = mlopt.stacked(net.eval(), 2)
    variables = list(stack.parameters())
    with torch.no_grad():
        for p in variables:
            p.add_(torch.randn_like(p) / 3)
    batch, mean, variance = draw(2, 0), net[1].running_mean, net[1].running_var + net[1].eps

    def by_hand() -> Tensor:
        losses = []
        for k in range(2):
            w, b, scale, shift, last, bias = (p[k] for p in variables)
            hidden = (((batch["x"][k] @ w.T + b) - mean) / variance.sqrt() * scale + shift).tanh()
            losses.append(((hidden @ last.T + bias).squeeze(-1) - batch["y"][k]).square().sum() / 2)
        return torch.stack(losses).sum()

    along = [torch.randn_like(p) for p in variables]
    results = []
    for value in (summed(stack, batch), by_hand()):
        gradient = torch.autograd.grad(value, variables, create_graph=True)
        results.append((value, gradient, torch.autograd.grad(gradient, variables, along)))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        (lambda: mlopt.stacked(nn.Linear(1, 1), 0), r"copies=0; it must be a whole number >= 1"),
        (lambda: mlopt.stacked(nn.Sequential(nn.BatchNorm1d(3)), 2), r"BatchNorm1d '0' has running statistics"),
        (lambda: summed(mlopt.stacked(norm().eval(), 2).train(), draw(2, 0)), r"BatchNorm1d 'module' has running"),
        (lambda: mlopt.stacked(nn.Linear(1, 1), 2)(torch.ones(1)), r"stacked Linear has 2 copies and cannot be called"),
        (lambda: summed(nn.Linear(3, 1), draw(2, 0)), r"no level that the loss takes is stacked"),
        (lambda: summed(mlopt.stacked(nn.Linear(3, 1), 3), draw(2, 0)), r"shape \(2, 7, 3\), .* that of the 3 tasks"),
        (lambda: summed(mlopt.stacked(nn.Linear(3, 1), 2), [object()]), r"holds a object, which cannot be cut"),
        (lambda: other(lambda net, batch: net(batch)), r"'loss' of one task has shape \(7, 1\); it must be a scalar"),
        (lambda: other(lambda net, batch: mlopt.Mixture([lambda: 0], weights="w")), r"is a Mixture, .* return a sum"),
        (
            lambda: other(lambda net, batch, *, shared: shared(batch).sum(), shared=norm()),
            r"BatchNorm1d '' has running",
        ),
        (lambda: other(lambda net, batch, *, more: 0, more=mlopt.stacked(norm(False), 3)), r"have 2 and 3 tasks"),
    ],
)
def test_what_cannot_be_stacked_is_refused(evaluate: Any, message: str) -> None:
    with pytest.raises(mlopt.MloptError, match=message):
        evaluate()


def summed(module: nn.Module, batch: Any) -> Tensor:
    return mlopt.over_tasks(support)(module, batch)


def other(loss: Any, **levels: nn.Module) -> Tensor:
    return mlopt.over_tasks(loss)(mlopt.stacked(nn.Linear(3, 1), 2), draw(2, 0)["x"], **levels)


def norm(track: bool = True) -> nn.Module:
    return nn.BatchNorm1d(3, track_running_stats=track)
