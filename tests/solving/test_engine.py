"""What a step refuses, what it logs, and streamed pullbacks beside other terms and arguments."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD

import mlopt
from mlopt import Level, Problem, variables

F64 = torch.float64
still = partial(SGD, lr=0.0)


class Weights(nn.Module):
    """Two weights, the variables themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([0.7, -0.4], dtype=F64))

    def forward(self):
        return self.value


def mixture(own, batch, *, weights):
    return mlopt.Mixture([lambda: own().square().sum(), lambda: own().pow(3).sum()], weights="weights")


def outer(own, batch, *, net):
    return (net() * torch.tensor([1.0, 2.0, 3.0], dtype=F64)).sum() + own().sum()


def gradient_of_second_step(problem):
    """Return the outer gradient at the second of two steps that move nothing: the first one that is streamed."""
    mlopt.solve(problem, 2, progress=False)
    return problem["weights"].module.value.grad.clone()


def problem(streamed, loss=mixture, regularizer=None, top=outer):
    return Problem(
        Level("weights", Weights(), top, optimizer=still),
        Level(
            "net",
            variables(torch.tensor([0.5, -1.0, 2.0], dtype=F64)),
            loss,
            regularizer=regularizer,
            optimizer=still,
            estimator=mlopt.Identity(streamed=streamed),
        ),
    )


def test_a_streamed_pullback_keeps_the_regularizers_part():
    def regularizer(own, *, weights):
        return (weights()[0] * own().square()).sum()

    streamed, exact = (gradient_of_second_step(problem(s, regularizer=regularizer)) for s in (True, False))
    torch.testing.assert_close(streamed, exact, rtol=1e-12, atol=0)
    without = gradient_of_second_step(problem(False))
    assert not torch.allclose(exact, without)


def test_only_the_weights_are_streamed():
    """A level inside whose mixture is weighed by the outermost, and depends on the level that steps: b's gradient is exact."""

    def inner(own, batch, *, weights, b):
        return mlopt.Mixture([lambda: (own() - b()).square().sum(), lambda: (own() * b()).sum()], weights="weights")

    def middle(own, batch, *, net):
        return net().square().sum() + own().square().sum()

    def top(own, batch, *, b):
        return b().sum() + own().square().sum()

    def build(streamed):
        return Problem(
            Level("weights", Weights(), top, optimizer=still),
            Level(
                "b", variables(torch.tensor([0.3, 1.2], dtype=F64)), middle, optimizer=still, estimator=mlopt.Dense()
            ),
            Level(
                "net",
                variables(torch.tensor([1.0, 2.0], dtype=F64)),
                inner,
                optimizer=still,
                estimator=mlopt.Identity(streamed=streamed),
            ),
        )

    def gradient_of_b(made):
        mlopt.solve(made, 2, progress=False)
        return made["b"].module.value.grad

    torch.testing.assert_close(gradient_of_b(build(True)), gradient_of_b(build(False)), rtol=1e-12, atol=0)


def test_rows_of_the_history_are_copies():
    def loss(own, batch):
        return {"loss": own().square().sum(), "x": own()}

    level = Level("x", variables(torch.ones(1, dtype=F64)), loss, optimizer=partial(SGD, lr=0.1))
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


def test_a_gradient_that_is_not_finite_moves_nothing():
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
def test_optimizers_and_steps_that_cannot_be(make, sentence):
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


def test_a_mixture_may_not_call_a_loss_loss():
    with pytest.raises(mlopt.ProblemError, match="named 'loss'"):
        mlopt.Mixture({"loss": torch.ones(())}, weights="weights")


def test_persistent_workers_are_left_alone_by_hypergradient():
    """What iterates over the loader goes on where it was."""
    loader = torch.utils.data.DataLoader(torch.arange(4.0), num_workers=1, persistent_workers=True)

    def loss(own, batch):
        return (own().sum() * batch).sum()

    problem = Problem(Level("x", variables(torch.ones(2)), loss, data=loader))
    running = iter(loader)
    seen = [next(running)]
    seen += [mlopt.hypergradient(problem).gradient["value"][:1] for _ in range(2)]
    assert torch.cat([*seen, *running]).tolist() == [0.0, 0.0, 1.0, 1.0, 2.0, 3.0]


def test_one_warm_neumann_term_is_one_update_of_soba():
    """q <- q + alpha (v - H q), and nothing more."""
    matrix, right, start = torch.diag(torch.tensor([1.0, 3.0])), torch.tensor([1.0, 2.0]), torch.tensor([0.4, -0.2])
    solver = mlopt.linear.Neumann(terms=1, step_size=0.1)
    found = solver.solve(lambda v: (matrix @ v[0],), (right,), initial=(start,))
    torch.testing.assert_close(found.value[0], start + 0.1 * (right - matrix @ start))
    assert found.products == 1
