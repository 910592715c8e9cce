"""Autocast and loss scales of levels, compared with loops that use torch.autocast and GradScaler."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from callback_cases import callback
from option_cases import Weights, by_identity, data, decay, end, make, network, training, validation
from torch import nn
from torch.amp import GradScaler
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR

import mlopt
from mlopt import Level, Problem, variables

F32 = torch.float32
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
adam = partial(Adam, lr=0.05)
halving = partial(StepLR, step_size=1, gamma=0.5)
#: Factor of the losses. The scale begins at 65536, so in half precision the first gradients overflow.
LARGE = 300.0


def large(own: Any, batch: Any, *, decay: Any) -> torch.Tensor:
    return LARGE * training(own, batch, decay=decay)["loss"]


def still(inner: dict[str, Any], size: int = 4, seed: int = 0) -> Problem:
    """Return the problem in float32 with an outer level that does not move."""
    outer = {"data": data(1, size, seed=seed, dtype=F32), "optimizer": partial(SGD, lr=0.0)}
    return make(inner, outer, dtype=F32)


class ByHand:
    """The optimizer of a level, by hand: a step in a precision, with a loss scale and a scheduler."""

    def __init__(self, module: nn.Module, precision: str | None) -> None:
        self.variables = list(module.parameters())
        self.optimizer = adam(self.variables)
        self.scheduler = halving(self.optimizer)
        self.scaler = GradScaler("cpu", enabled=precision == "fp16")
        self.dtype = DTYPES.get(precision or "")
        self.scales: list[float] = []

    @property
    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def step(self) -> None:
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scales.append(self.scaler.get_scale())
        if self.scales[-1] >= before:
            self.scheduler.step()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_level_in_low_precision_matches_the_loop_of_torch(precision: str, accumulate: int) -> None:
    batches = data(4, 8, dtype=F32)
    options = {"loss": large, "data": batches, "optimizer": adam, "scheduler": halving}
    problem = still({**options, "precision": precision, "accumulate": accumulate})
    history = mlopt.solve(problem, 12, progress=False).history

    net, own = network(F32), decay(F32)
    hand, taken = ByHand(net, precision), 0
    for _ in range(12):
        hand.optimizer.zero_grad()
        for _ in range(accumulate):
            with hand.autocast:
                loss = large(net, batches[taken % 4], decay=own)
            taken += 1
            (hand.scaler.scale(loss) / accumulate).backward(inputs=hand.variables)
        hand.step()
    torch.testing.assert_close(end(problem)[1:], [p.detach() for p in net.parameters()], rtol=1e-6, atol=1e-7)
    # The precision has an effect: a loop in full precision ends elsewhere.
    exact = still(options)
    mlopt.solve(exact, 12, progress=False)
    assert not torch.allclose(end(exact)[1], end(problem)[1], rtol=1e-5)
    if precision == "fp16":
        scales = history.column("net/loss_scale")
        assert scales == hand.scales
        assert scales[0] == 2.0**15, "the first gradient should overflow"
        assert scales[-1] == scales[-2], "the last one should not"
    else:
        assert "net/loss_scale" not in history.names


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_mixture_in_low_precision_matches_the_loop_of_torch(precision: str) -> None:
    """The signals of a streamed pullback are those of the unscaled losses; there are none if the scaled ones overflowed."""
    batch = data(1, 8, dtype=F32)[0]

    def losses(own):
        return [
            lambda: LARGE * (own(batch[0]) - batch[1]).square().mean(),
            lambda: LARGE * (own(batch[0]) + 1).abs().mean(),
        ]

    def mixture(own, batch, *, weights):
        return mlopt.Mixture(losses(own), weights="weights")

    def regularizer(own):
        return own[0].weight.square().sum()

    def outer(own, batch, *, net):
        return (net(batch[0]) - 0.5).square().mean()

    signals = []
    watch = callback(on_step_end=lambda run: signals.append(problem["weights"].module.logits.grad.clone()))
    problem = Problem(
        Level("weights", Weights(dtype=F32), outer, data=[batch], optimizer=partial(SGD, lr=0.0)),
        Level(
            "net",
            network(F32),
            mixture,
            optimizer=adam,
            scheduler=halving,
            regularizer=regularizer,
            precision=precision,
            estimator=mlopt.Identity(streamed=True),
        ),
    )
    history = mlopt.solve(problem, 12, callbacks=[watch], progress=False).history

    net, weights = network(F32), Weights(dtype=F32)
    hand, held, expected, recomputed = ByHand(net, precision), None, [], 0
    for _ in range(12):
        hand.optimizer.zero_grad()
        w, total, scale = weights().detach(), [torch.zeros_like(p) for p in hand.variables], hand.scaler.get_scale()
        shares: list[torch.Tensor] = []
        for k in range(2):
            with hand.autocast:
                loss = losses(net)[k]()
            gradient = torch.autograd.grad(hand.scaler.scale(loss), hand.variables)
            total = [t + w[k] * g for t, g in zip(total, gradient, strict=True)]
            if held is not None:
                shares.append(sum((g / scale * p).sum() for g, p in zip(gradient, held, strict=True)))
        for p, t in zip(hand.variables, total, strict=True):
            p.grad = t
        hand.scaler.scale(regularizer(net)).backward(inputs=hand.variables)
        hand.step()
        before, held = held, torch.autograd.grad((net(batch[0]) - 0.5).square().mean(), hand.variables)
        if before is None or not torch.stack(shares).isfinite().all():
            # Nothing is streamed: the pullback evaluates the losses again, without autocast.
            gradients = [torch.autograd.grad(losses(net)[k](), hand.variables) for k in range(2)]
            shares = [sum((g * p).sum() for g, p in zip(gradient, held, strict=True)) for gradient in gradients]
            recomputed += 1
        expected.append(-torch.autograd.grad(weights(), weights.logits, torch.stack(shares))[0])
    torch.testing.assert_close(end(problem)[1:], [p.detach() for p in net.parameters()], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(signals, expected, rtol=1e-4, atol=1e-6)
    assert (1 < recomputed < 12) if precision == "fp16" else recomputed == 1
    if precision == "fp16":
        assert history.column("net/loss_scale") == hand.scales
        assert hand.scales[0] < 2.0**16


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_an_outermost_level_in_low_precision_matches_the_loop_of_torch(precision: str) -> None:
    """The direct derivatives are of the scaled loss under autocast; the pullback and its products are not."""
    batches, held_out = data(3, 8, dtype=F32), data(2, 6, seed=1, dtype=F32)

    def outer(own, batch, *, net):
        return LARGE * validation(own, batch, net=net)

    problem = make(
        {"data": batches, "optimizer": partial(SGD, lr=0.05)},
        {"loss": outer, "data": held_out, "optimizer": adam, "scheduler": halving, "precision": precision},
        dtype=F32,
    )
    history = mlopt.solve(problem, 12, progress=False).history

    net, own = network(F32), decay(F32)
    inner, hand = SGD(net.parameters(), lr=0.05), ByHand(own, precision)
    for k in range(12):
        inner.zero_grad()
        batch = batches[k % 3]
        training(net, batch, decay=own)["loss"].backward(inputs=list(net.parameters()))
        inner.step()
        with hand.autocast:
            loss = outer(own, held_out[k % 2], net=net)
        scale = hand.scaler.get_scale()
        *cotangent, direct = torch.autograd.grad(hand.scaler.scale(loss), [*net.parameters(), own.value])
        if all(g.isfinite().all() for g in (*cotangent, direct)):
            through = by_identity(net, own, [v / scale for v in cotangent], batch)
            own.value.grad = (direct / scale + through) * scale
        else:
            own.value.grad = torch.full_like(own.value, torch.inf)
        hand.step()
    torch.testing.assert_close(
        end(problem), [p.detach() for p in (*own.parameters(), *net.parameters())], rtol=1e-5, atol=1e-6
    )
    if precision == "fp16":
        assert history.column("decay/loss_scale") == hand.scales
        assert hand.scales[0] < 2.0**16
        assert hand.scales[-1] == hand.scales[-2]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("estimator", [mlopt.Identity(), mlopt.ConjugateGradient(iterations=5)], ids=["identity", "cg"])
def test_products_are_computed_without_autocast(precision: str, estimator: mlopt.Estimator) -> None:
    """If the inner level does not move, its precision does not change the hypergradient."""

    def gradient(chosen: str | None) -> torch.Tensor:
        inner = {"data": data(1, 8, dtype=F32), "optimizer": partial(SGD, lr=0.0)}
        problem = still({**inner, "precision": chosen, "estimator": estimator}, size=6, seed=1)
        mlopt.solve(problem, 1, progress=False)
        return problem["decay"].module.value.grad

    assert torch.equal(gradient(precision), gradient(None))


def test_an_overflowed_gradient_is_logged_before_clipping_and_its_step_is_skipped() -> None:
    x = variables(torch.full((2,), 3.0))
    level = Level("x", x, lambda own, batch: 1e35 * own().square().sum(), optimizer=adam, precision="fp16", clip=1.0)
    history = mlopt.solve(Problem(level), 1, progress=False).history
    assert history[0]["x/gradient_norm"] == float("inf")
    assert history[0]["x/loss_scale"] == 2.0**15
    assert torch.equal(x.value, torch.full((2,), 3.0))


def test_look_ahead_does_not_change_the_scale() -> None:
    """A retaken step does not count its overflow twice: the scale is halved once per outer step."""
    inner = {"loss": large, "data": data(1, 8, dtype=F32), "optimizer": adam, "precision": "fp16"}
    problem, plain = still(inner), still(inner)
    ahead = mlopt.solve(problem, 5, lookahead=True, progress=False).history
    expected = mlopt.solve(plain, 5, progress=False).history
    assert ahead.column("net/loss_scale") == expected.column("net/loss_scale")
    assert expected.column("net/loss_scale")[0] == 2.0**15
    torch.testing.assert_close(end(problem), end(plain), rtol=0, atol=0)
