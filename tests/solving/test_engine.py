"""Refusals and logs of a step, and streamed pullbacks together with other terms and arguments."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from option_cases import F64, vector
from torch import nn
from torch.optim import LBFGS, SGD

import mlopt
from mlopt import Level, Problem, variables

still = partial(SGD, lr=0.0)


def mixture(own, batch, *, weights):
    return mlopt.Mixture([lambda: own().square().sum(), lambda: own().pow(3).sum()], weights="weights")


def outer(own, batch, *, net):
    return (net() * torch.tensor([1.0, 2.0, 3.0], dtype=F64)).sum() + own().sum()


def gradient_of_second_step(problem):
    """Return the outer gradient at the second of two steps that move nothing; it is the first streamed one."""
    mlopt.solve(problem, 2, progress=False)
    return problem["weights"].module.value.grad.clone()


def problem(streamed, loss=mixture, regularizer=None, top=outer):
    rule = mlopt.Identity(streamed=streamed)
    return Problem(
        Level("weights", vector(0.7, -0.4), top, optimizer=still),
        Level("net", vector(0.5, -1.0, 2.0), loss, regularizer=regularizer, optimizer=still, estimator=rule),
    )


def test_a_streamed_pullback_includes_the_regularizer():
    def regularizer(own, *, weights):
        return (weights()[0] * own().square()).sum()

    streamed, exact = (gradient_of_second_step(problem(s, regularizer=regularizer)) for s in (True, False))
    torch.testing.assert_close(streamed, exact, rtol=1e-12, atol=0)
    without = gradient_of_second_step(problem(False))
    assert not torch.allclose(exact, without)


def test_only_the_weights_are_streamed():
    """The outermost level weights the mixture, which also depends on b: the gradient of b is exact."""

    def inner(own, batch, *, weights, b):
        return mlopt.Mixture([lambda: (own() - b()).square().sum(), lambda: (own() * b()).sum()], weights="weights")

    def middle(own, batch, *, net):
        return net().square().sum() + own().square().sum()

    def top(own, batch, *, b):
        return b().sum() + own().square().sum()

    def build(streamed):
        rule = mlopt.Identity(streamed=streamed)
        return Problem(
            Level("weights", vector(0.7, -0.4), top, optimizer=still),
            Level("b", vector(0.3, 1.2), middle, optimizer=still, estimator=mlopt.Dense()),
            Level("net", vector(1.0, 2.0), inner, optimizer=still, estimator=rule),
        )

    def gradient_of_b(made):
        mlopt.solve(made, 2, progress=False)
        return made["b"].module.value.grad

    torch.testing.assert_close(gradient_of_b(build(True)), gradient_of_b(build(False)), rtol=1e-12, atol=0)


def test_rows_of_the_history_are_copies():
    def loss(own, batch):
        return {"loss": own().square().sum(), "x": own()}

    level = Level("x", vector(1.0), loss, optimizer=partial(SGD, lr=0.1))
    solution = mlopt.solve(Problem(level), 3, progress=False)
    assert solution.history.column("x/x") == pytest.approx([1.0, 0.8, 0.64])


def test_a_vector_cannot_be_logged():
    def loss(own, batch):
        return {"loss": own().sum(), "x": own()}

    with pytest.raises(mlopt.ProblemError, match=r"'x/x' was logged with shape \(3,\)"):
        mlopt.solve(Problem(Level("x", variables(torch.ones(3)), loss, optimizer=still)), 1)


def test_given_batches_move_to_their_level():
    moved = []

    class Batch:
        def to(self, device):
            moved.append(device)
            return self

    def loss(own, batch):
        return own().sum()

    mlopt.hypergradient(Problem(Level("x", variables(torch.ones(3)), loss)), {"x": Batch()})
    assert moved == [torch.device("cpu")]


def test_a_nonfinite_gradient_moves_nothing():
    def loss(own, batch):
        return own().square().sum().sqrt()

    x = variables(torch.zeros(2))
    with pytest.raises(mlopt.NonFiniteError, match="the gradient of level 'x' is not finite"):
        mlopt.solve(Problem(Level("x", x, loss, optimizer=partial(SGD, lr=0.1))), 1)
    assert x.value.tolist() == [0.0, 0.0]


def plain(own, batch):
    return sum(p.square().sum() for p in own.parameters())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda net: {"optimizer": SGD(net[0].parameters(), lr=0.1)},
            "leaves out 2 of the level's 4 trainable tensors",
        ),
        (lambda net: {"optimizer": partial(LBFGS, lr=0.1)}, "LBFGS needs a closure"),
        (lambda net: {"optimizer": still, "steps": 5}, "steps=5, but the outermost level is not solved inside another"),
    ],
)
def test_invalid_optimizers_and_steps_are_refused(make, sentence):
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(mlopt.ProblemError, match=sentence):
        mlopt.solve(Problem(Level("x", net, plain, **make(net))), 1)


@pytest.mark.parametrize(
    ("loss", "sentence"),
    [
        (lambda own, batch: own().sum().detach(), "has no gradient"),
        (lambda own, batch: torch.ones((), requires_grad=True) * 2, "does not depend on its own variables"),
    ],
)
def test_losses_without_a_gradient_are_named(loss, sentence):
    with pytest.raises(mlopt.ProblemError, match=sentence):
        mlopt.solve(Problem(Level("x", variables(torch.ones(2)), loss, optimizer=still)), 1)


def test_a_mixture_may_not_name_a_loss_loss():
    with pytest.raises(mlopt.ProblemError, match="named 'loss'"):
        mlopt.Mixture({"loss": torch.ones(())}, weights="weights")


def test_hypergradient_does_not_disturb_persistent_workers():
    """An iteration over the loader continues at its position."""
    loader = torch.utils.data.DataLoader(torch.arange(4.0), num_workers=1, persistent_workers=True)

    def loss(own, batch):
        return (own().sum() * batch).sum()

    problem = Problem(Level("x", variables(torch.ones(2)), loss, data=loader))
    running = iter(loader)
    seen = [next(running)]
    seen += [mlopt.hypergradient(problem).gradient["value"][:1] for _ in range(2)]
    assert torch.cat([*seen, *running]).tolist() == [0.0, 0.0, 1.0, 1.0, 2.0, 3.0]


def test_one_warm_neumann_term_is_one_update_of_soba():
    """The update is q <- q + alpha (v - H q)."""
    matrix, right, start = torch.diag(torch.tensor([1.0, 3.0])), torch.tensor([1.0, 2.0]), torch.tensor([0.4, -0.2])
    solver = mlopt.linear.Neumann(iterations=1, step_size=0.1)
    solution = solver.solve(lambda v: (matrix @ v[0],), (right,), initial=(start,))
    torch.testing.assert_close(solution.value[0], start + 0.1 * (right - matrix @ start))
    assert solution.products == 1
