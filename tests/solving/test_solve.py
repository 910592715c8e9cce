"""The schedule of solve: the order of the steps and their gradients; nothing else moves."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from callback_cases import callback
from option_cases import F64, Weights, nest, steps_of, vector
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR

import mlopt
from mlopt import Level, Problem, variables

sgd = partial(SGD, lr=0.1)


def tapweight_like(calls, steps=(1, 2)):
    """Return reweighting(finetuning), finetuning(pretraining), pretraining(reweighting) on scalars."""

    def outer(own, batch, *, finetuning):
        calls.append("reweighting")
        return finetuning().square().sum()

    def middle(own, batch, *, pretraining):
        calls.append("finetuning")
        return (own() - pretraining()).square().sum()

    def inner(own, batch, *, reweighting):
        calls.append("pretraining")
        return (own() - reweighting()).square().sum()

    return Problem(
        Level("reweighting", vector(1.0), outer, optimizer=sgd),
        Level("finetuning", vector(1.0), middle, optimizer=sgd, steps=steps[0], estimator=mlopt.Identity()),
        Level("pretraining", vector(1.0), inner, optimizer=sgd, steps=steps[1], estimator=mlopt.Identity()),
    )


def test_the_last_listed_level_steps_first():
    calls = []
    problem = tapweight_like(calls, steps=(3, 2))
    order = []

    def watch(run):
        order.append(tuple(calls))
        calls.clear()

    mlopt.solve(problem, 2, callbacks=[callback(on_step_end=watch)])
    # The steps of the levels, then the outer loss, then the evaluations of the pullbacks.
    for step in order:
        assert step[:6] == ("pretraining",) * 2 + ("finetuning",) * 3 + ("reweighting",)
        assert set(step[6:]) == {"finetuning", "pretraining"}


def test_a_nested_level_is_solved_before_each_step_of_its_host():
    assert [name for name, _ in steps_of(nest(mlopt.Dense()), 1)] == ["z", "z", "y"] * 2 + ["x"]


def test_a_step_follows_the_total_gradient():
    """Compare a step of the middle level with one by hand: the direct derivative of y plus that through z."""
    a, b, c = 2.0, 0.7, 1.3

    def bottom(own, batch, *, y):
        return 0.5 * a * own().square().sum() - b * (own() * y()).sum()

    def middle(own, batch, *, z, x):
        return 0.5 * c * own().square().sum() + (own() * z()).sum() - (own() * x()).sum()

    def top(own, batch, *, y):
        return y().sum() + own().square().sum()

    z0, y0, x0 = 0.4, 0.9, -0.3
    problem = Problem(
        Level("x", vector(x0), top, optimizer=partial(SGD, lr=0.0)),
        Level("y", vector(y0), middle, optimizer=sgd, estimator=mlopt.Dense()),
        Level("z", vector(z0), bottom, optimizer=sgd, estimator=mlopt.Dense()),
    )
    mlopt.solve(problem, 1)
    z1 = z0 - 0.1 * (a * z0 - b * y0)
    total = c * y0 + z1 - x0 + y0 * b / a  # dz*/dy = b / a
    assert problem["y"].module.value.item() == pytest.approx(y0 - 0.1 * total, rel=1e-12)


def test_the_outer_step_follows_the_hypergradient_of_the_latest_batches():
    """Compare with a plain loop with dropout: masks and batch are those of the latest inner step."""
    torch.manual_seed(0)
    batches = [torch.randn(8, 3, dtype=F64) for _ in range(4)]

    def training(own, batch, *, decay):
        return own(batch).square().mean() + (decay().exp() * own[0].weight.square()).sum()

    def validation(own, batch, *, net):
        return (net(batch) - 1).square().mean()

    def network():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 2, dtype=F64), nn.Dropout(0.5))

    decay = variables(torch.zeros(2, 3, dtype=F64))
    problem = Problem(
        Level("decay", decay, validation, data=batches[:1], optimizer=sgd),
        Level("net", network(), training, data=batches[1:], optimizer=sgd, steps=2, estimator=mlopt.Identity()),
    )
    mlopt.solve(problem, 3, seed=5)

    net, own = network(), torch.zeros(2, 3, dtype=F64, requires_grad=True)
    mlopt.rng.seed_everything(5)
    position = 0
    for _ in range(3):
        for _ in range(2):
            state = torch.get_rng_state()
            batch = batches[1 + position % 3]
            position += 1
            loss = net(batch).square().mean() + (own.exp() * net[0].weight.square()).sum()
            gradients = torch.autograd.grad(loss, net.parameters())
            with torch.no_grad():
                for p, g in zip(net.parameters(), gradients, strict=True):
                    p -= 0.1 * g
        v = torch.autograd.grad((net(batches[0]) - 1).square().mean(), list(net.parameters()))
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        loss = net(batch).square().mean() + (own.exp() * net[0].weight.square()).sum()
        g = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
        inner = sum((x * y).sum() for x, y in zip(g, v, strict=True))
        (mixed,) = torch.autograd.grad(inner, own)
        torch.set_rng_state(after)
        with torch.no_grad():
            own += 0.1 * mixed
    torch.testing.assert_close(decay.value.detach(), own.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("estimator", [mlopt.Identity(), mlopt.FiniteDifference(), mlopt.Neumann(iterations=3)])
def test_training_does_not_depend_on_the_estimator(estimator):
    """If the outer level does not move, the inner level takes the same path with every estimator."""

    def run(chosen):
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1))
        data = torch.utils.data.DataLoader(torch.randn(32, 4), batch_size=8, shuffle=True)

        def training(own, batch, *, decay):
            return own(batch).square().mean() + decay().sum() * own[0].weight.square().sum()

        def validation(own, batch, *, net):
            return net(batch).mean()

        problem = Problem(
            Level("decay", variables(torch.ones(1)), validation, data=data, optimizer=partial(SGD, lr=0.0)),
            Level("net", net, training, data=data, optimizer=partial(Adam, lr=0.01), estimator=chosen),
        )
        mlopt.solve(problem, 6, seed=0)
        return net.state_dict()

    expected, state = run(mlopt.Dense(damping=1.0)), run(estimator)
    for name, tensor in expected.items():
        assert torch.equal(tensor, state[name]), name


def test_only_own_steps_move_buffers():
    """The outer loss runs the inner module in train mode, but only its own steps update the BatchNorm statistics."""
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

    def training(own, batch, *, shift):
        return (own(batch) - shift()).square().mean()

    def validation(own, batch, *, net):
        return net(batch).mean() + own().square().sum()

    batch = torch.randn(8, 2)
    problem = Problem(
        Level("shift", variables(torch.ones(2)), validation, data=[batch + 100], optimizer=sgd),
        Level("net", net, training, data=[batch], optimizer=sgd, steps=2, estimator=mlopt.Neumann(iterations=2)),
    )
    mlopt.solve(problem, 3)
    assert net[1].num_batches_tracked.item() == 6
    assert net[1].running_mean.abs().max() < 10


def test_a_solve_is_reproducible_by_its_seed_or_that_of_torch():
    def run(seed, manual):
        torch.manual_seed(manual)
        weights = variables(torch.zeros(16))
        data = torch.utils.data.DataLoader(torch.arange(16.0), batch_size=4, shuffle=True)

        def loss(own, batch):
            return (own()[batch.long()] * batch).sum() + own().square().sum()

        solution = mlopt.solve(Problem(Level("w", weights, loss, data=data, optimizer=sgd)), 3, seed=seed)
        return solution.history.column("w/loss")

    assert run(7, 0) == run(7, 1)
    assert run(7, 0) != run(8, 0)
    assert run(None, 4) == run(None, 4)
    assert run(None, 4) != run(None, 5)


@pytest.mark.parametrize("lazy", [True, False])
def test_a_step_on_a_mixture_equals_that_on_the_weighted_sum(lazy):
    def pretraining(own, batch, *, weights):
        losses = [lambda: (own() - 1).square().sum(), lambda: (own() + 2).abs().sum()]
        return mlopt.Mixture(losses if lazy else [loss() for loss in losses], weights="weights")

    def plain(own, batch, *, weights):
        w = weights()
        return w[0] * (own() - 1).square().sum() + w[1] * (own() + 2).abs().sum()

    def outer(own, batch, *, net):
        return net().square().sum()

    def run(loss):
        net, weights = variables(torch.linspace(-3, 3, 5, dtype=F64)), Weights()
        problem = Problem(
            Level("weights", weights, outer, optimizer=sgd),
            Level("net", net, loss, optimizer=sgd, steps=3, estimator=mlopt.Identity()),
        )
        solution = mlopt.solve(problem, 4)
        return net.value.detach(), weights.logits.detach(), solution.history.column("net/loss")

    mixture, expected = run(pretraining), run(plain)
    torch.testing.assert_close(mixture[0], expected[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(mixture[1], expected[1], rtol=1e-12, atol=0)
    assert mixture[2] == pytest.approx(expected[2], rel=1e-12)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_streaming_uses_the_cotangent_of_the_previous_step(factor):
    """The streamed derivative at step t is -c (dw/da)^T <grad L_k(theta_t), p_(t-1)>; the first one is recomputed."""
    estimator = mlopt.Identity(scale=factor, streamed=True)
    targets = torch.tensor([[1.0, 0.0, 2.0], [-1.0, 3.0, 0.5]], dtype=F64)

    def pretraining(own, batch, *, weights):
        return mlopt.Mixture([lambda k=k: (own() - targets[k]).pow(4).sum() for k in range(2)], weights="weights")

    def outer(own, batch, *, net):
        return (net() - 0.5).square().sum()

    gradients, ages = [], []

    def watch(run):
        gradients.append(weights.logits.grad.clone())
        ages.append(run.engine.gradients.reports["net"].age)

    weights, net = Weights(), variables(torch.zeros(3, dtype=F64))
    problem = Problem(
        Level("weights", weights, outer, optimizer=partial(SGD, lr=0.3)),
        Level("net", net, pretraining, optimizer=partial(SGD, lr=0.01), estimator=estimator),
    )
    mlopt.solve(problem, 4, callbacks=[callback(on_step_end=watch)])

    theta, a, held = torch.zeros(3, dtype=F64), torch.tensor([0.3, -0.2], dtype=F64), None
    for step in range(4):
        w = a.softmax(0)
        g = 4 * (theta - targets).pow(3)
        at_step = theta
        theta = theta - 0.01 * (w[:, None] * g).sum(0)
        p = 2 * (theta - 0.5)
        used = 4 * (theta - targets).pow(3) @ p if held is None else 4 * (at_step - targets).pow(3) @ held
        expected = -factor * (torch.diag(w) - w[:, None] * w) @ used
        torch.testing.assert_close(gradients[step], expected, rtol=1e-12, atol=1e-14)
        a, held = a - 0.3 * expected, p
    assert ages == [0, 1, 1, 1]


def test_a_callback_stops_the_run_and_the_scheduler_steps():
    def loss(own, batch):
        return {"loss": own().square().sum(), "size": own().norm()}

    level = Level("x", vector(4.0), loss, optimizer=sgd, scheduler=partial(StepLR, step_size=1))
    stop = callback(on_step_end=lambda run: run.stop("enough") if run.step == 3 else None)
    solution = mlopt.solve(Problem(level), 10, callbacks=[stop])
    assert solution.status == "enough"
    assert [row["step"] for row in solution.history] == [1, 2, 3]
    # lr 0.1, 0.01: x = 4, 4 * 0.8, 4 * 0.8 * 0.98
    assert solution.history.column("x/size") == pytest.approx([4.0, 3.2, 3.136], rel=1e-12)
    with pytest.raises(KeyError, match="x/loss, x/size"):
        solution.history.column("y/loss")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "optimizer=None"),
        ({"optimizer": lambda parameters: 3}, "returned a int"),
        ({"optimizer": SGD([nn.Parameter(torch.ones(1))], lr=0.1)}, "not the level's variables"),
        (
            {"optimizer": sgd, "scheduler": lambda optimizer: 3},
            "scheduler returned a int without step, state_dict, load_",
        ),
        (
            {"optimizer": sgd, "scheduler": lambda optimizer: SimpleNamespace(step=lambda: None)},
            "level 'x': scheduler returned a SimpleNamespace without state_dict, load_state_dict; .* with these methods",
        ),
    ],
)
def test_missing_or_invalid_optimizers_are_named(arguments, sentence):
    def loss(own, batch):
        return own().sum()

    with pytest.raises(mlopt.ProblemError, match=sentence):
        mlopt.solve(Problem(Level("x", variables(torch.ones(1)), loss, **arguments)), 1)


def test_a_nonfinite_loss_is_named_and_nothing_steps():
    def loss(own, batch):
        return own().log().sum()

    x = variables(torch.tensor([-1.0]))
    with pytest.raises(mlopt.NonFiniteError, match="level 'x' is nan"):
        mlopt.solve(Problem(Level("x", x, loss, optimizer=sgd)), 1)
    assert x.value.item() == -1.0
