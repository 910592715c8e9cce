"""Options of a level, compared with loops in plain torch: accumulation, clipping, schedulers, warm-up, device."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import cycle
from typing import Any

import pytest
import torch
from callback_cases import after_each_step, callback
from core_cases import Counting
from hypothesis import given, settings
from hypothesis import strategies as st
from option_cases import Weights, by_identity, data, decay, end, make, network, training, validation
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR

import mlopt
from mlopt import Level, Problem, variables

adam = partial(Adam, lr=0.05)
close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-14)


def joined(batches: list[Any], count: int) -> list[Any]:
    """Join each `count` batches to one."""
    groups = [batches[k : k + count] for k in range(0, len(batches), count)]
    return [tuple(torch.cat(parts) for parts in zip(*group, strict=True)) for group in groups]


@settings(max_examples=8, deadline=None)
@given(inner=st.integers(1, 3), outer=st.integers(1, 3), seed=st.integers(0, 1000))
def test_accumulated_batches_equal_one_large_batch(inner: int, outer: int, seed: int) -> None:
    """The mixed product here does not depend on the batch, so it does not matter which one a pullback replays."""

    def regularizer(own, *, decay):
        return 0.3 * own[2].weight.square().sum() + 0.1 * (decay() * own[0].weight).sum()

    rules = []

    def run(small: bool):
        rules.append(Counting(mlopt.Identity()))
        lower, upper = data(2 * inner, 4, seed=seed), data(2 * outer, 3, seed=seed + 1)
        batches = (lower, upper) if small else (joined(lower, inner), joined(upper, outer))
        options = [
            {"data": rows, "accumulate": count if small else 1, "optimizer": adam}
            for rows, count in zip(batches, (inner, outer), strict=True)
        ]
        problem = make({**options[0], "steps": 2, "regularizer": regularizer, "estimator": rules[-1]}, options[1])
        return mlopt.solve(problem, 3, progress=False).history, end(problem)

    (history, reached), (expected, aim) = run(small=True), run(small=False)
    close(reached, aim)
    assert history.names == expected.names
    for name in ("net/loss", "net/error", "decay/loss"):
        assert history.column(name) == pytest.approx(expected.column(name), rel=1e-12)
    assert [rule.linearizations["net"] for rule in rules] == [3, 3]  # once per outer step for any number of batches


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("lazy", [True, False])
def test_accumulated_mixtures_equal_one_large_batch(streamed: bool, lazy: bool) -> None:
    """So do the signals of streamed pullbacks; other pullbacks replay only the last batch."""

    def mixture(own, batch, *, weights):
        losses = {
            "near": lambda: (own(batch[0]) - batch[1]).square().mean(),
            "far": lambda: (own(batch[0]) + 1).pow(4).mean(),
        }
        chosen = losses if lazy else {name: loss() for name, loss in losses.items()}
        return {"loss": mlopt.Mixture(chosen, weights="weights"), "size": batch[0].square().mean()}

    def outer(own, batch, *, net):
        return (net(batch[0]) - batch[1]).square().mean()

    def regularizer(own, *, weights):
        return 0.3 * weights()[0] * own[2].weight.square().sum()

    def run(small: bool):
        lower = data(6, 4)
        problem = Problem(
            # Without streaming, only the path of the inner level can be compared.
            Level("weights", Weights(), outer, data=data(1, 9), optimizer=partial(SGD, lr=0.3 if streamed else 0.0)),
            Level(
                "net",
                network(),
                mixture,
                data=lower if small else joined(lower, 3),
                accumulate=3 if small else 1,
                optimizer=partial(SGD, lr=0.02),
                regularizer=regularizer,
                estimator=mlopt.Identity(streamed=streamed),
            ),
        )
        gradients = []

        def watch(run):
            gradients.append(problem["weights"].module.logits.grad.clone())
            if run.step == 1:
                # The first pullback is not streamed and replays one batch, so the two runs would diverge.
                problem["weights"].module.load_state_dict(Weights().state_dict())

        history = mlopt.solve(problem, 4, callbacks=[callback(on_step_end=watch)], progress=False).history
        return history, end(problem), gradients[1:]

    (history, reached, signals), (expected, aim, aims) = run(small=True), run(small=False)
    close(reached, aim)
    if streamed:
        close(signals, aims)
    assert {"net/near", "net/far", "net/size", "net/loss"} <= set(history.names)
    for name in expected.names:
        assert history.column(name) == pytest.approx(expected.column(name), rel=1e-12), name


@settings(max_examples=8, deadline=None)
@given(limits=st.tuples(st.floats(0.05, 2.0), st.floats(0.01, 2.0)), inner=st.integers(1, 3))
def test_clipping_matches_torch(limits: tuple[float, float], inner: int) -> None:
    lower, upper = data(3, 4), data(2, 5, seed=1)
    problem = make(
        {"data": lower, "optimizer": adam, "steps": inner, "clip": limits[0]},
        {"data": upper, "optimizer": partial(SGD, lr=0.5), "clip": limits[1]},
    )
    history = mlopt.solve(problem, 4, progress=False).history

    net, own = network(), decay()
    optimizers, sizes = (adam(net.parameters()), SGD(own.parameters(), lr=0.5)), []
    batches, validations = cycle(lower), cycle(upper)
    for _ in range(4):
        for _ in range(inner):
            batch = next(batches)
            optimizers[0].zero_grad()
            training(net, batch, decay=own)["loss"].backward(inputs=list(net.parameters()))
            size = nn.utils.clip_grad_norm_(net.parameters(), limits[0])
            optimizers[0].step()
        *cotangent, direct = torch.autograd.grad(
            validation(own, next(validations), net=net), [*net.parameters(), own.value]
        )
        own.value.grad = direct + by_identity(net, own, cotangent, batch)
        sizes.append((float(size), float(nn.utils.clip_grad_norm_(own.parameters(), limits[1]))))
        optimizers[1].step()
    close(end(problem), [p.detach() for p in (*own.parameters(), *net.parameters())])
    # For an inner level, a row has the norm of the last step.
    assert history.column("net/gradient_norm") == pytest.approx([s for s, _ in sizes], rel=1e-12)
    assert history.column("decay/gradient_norm") == pytest.approx([s for _, s in sizes], rel=1e-12)


SCHEDULERS = {
    "step": partial(StepLR, step_size=2, gamma=0.5),
    "cycle": partial(OneCycleLR, max_lr=0.1, total_steps=20),
    "plateau": partial(ReduceLROnPlateau, patience=0, threshold=0.3, factor=0.5),
}


@pytest.mark.parametrize("lower", SCHEDULERS)
@pytest.mark.parametrize("upper", SCHEDULERS)
def test_schedulers_step_once_per_step_of_their_level(lower: str, upper: str) -> None:
    batch, held_out = data(1, 6)[0], data(1, 6, seed=1)[0]
    rates = []

    def watch(run):
        rates.append([run.engine.optimizers[name].param_groups[0]["lr"] for name in ("decay", "net")])

    problem = make(
        {"data": [batch], "optimizer": adam, "steps": 2, "warmup": 1, "scheduler": SCHEDULERS[lower]},
        {"data": [held_out], "optimizer": adam, "scheduler": SCHEDULERS[upper]},
    )
    mlopt.solve(problem, 6, callbacks=[callback(on_step_end=watch)], progress=False)

    net, own = network(), decay()
    inner, outer = adam(net.parameters()), adam(own.parameters())
    schedulers, expected = (SCHEDULERS[upper](outer), SCHEDULERS[lower](inner)), []

    def scheduled(which: int, loss: torch.Tensor) -> None:
        if isinstance(schedulers[which], ReduceLROnPlateau):
            schedulers[which].step(loss.item())
        else:
            schedulers[which].step()

    def inner_step() -> None:
        inner.zero_grad()
        loss = training(net, batch, decay=own)["loss"]
        loss.backward(inputs=list(net.parameters()))
        inner.step()
        scheduled(1, loss)

    inner_step()
    for _ in range(6):
        inner_step()
        inner_step()
        loss = validation(own, held_out, net=net)
        *cotangent, direct = torch.autograd.grad(loss, [*net.parameters(), own.value])
        own.value.grad = direct + by_identity(net, own, cotangent, batch)
        outer.step()
        scheduled(0, loss)
        expected.append([outer.param_groups[0]["lr"], inner.param_groups[0]["lr"]])
    assert rates == expected
    assert len({tuple(rate) for rate in rates}) > 1
    close(end(problem), [p.detach() for p in (*own.parameters(), *net.parameters())])


def test_warm_up_runs_once_with_the_optimizer_of_the_solve() -> None:
    """Three warm-up steps and one step of the solve are four consecutive steps of Adam."""
    batches, steps = data(3, 4), Counter()

    seen: list[dict[str, int]] = []
    callbacks = [
        after_each_step(lambda name, run: steps.update([name])),
        callback(on_step_begin=lambda run: seen.append(dict(steps))),
    ]
    still = {"data": data(1, 4, seed=1), "optimizer": partial(SGD, lr=0.0)}
    problem = make({"data": batches, "optimizer": adam, "warmup": 3}, still)
    mlopt.solve(problem, 1, callbacks=callbacks, progress=False)
    assert seen == [{"net": 3}]
    assert steps == {"net": 4, "decay": 1}

    net, own = network(), decay()
    optimizer = adam(net.parameters())
    for batch in [*batches, batches[0]]:
        optimizer.zero_grad()
        training(net, batch, decay=own)["loss"].backward(inputs=list(net.parameters()))
        optimizer.step()
    close(end(problem)[1:], [p.detach() for p in net.parameters()])


def test_without_outer_steps_there_is_no_warm_up() -> None:
    problem = make({"data": data(1, 4), "optimizer": adam, "warmup": 3}, {"data": data(1, 4), "optimizer": adam})
    before = end(problem)
    mlopt.solve(problem, 0, progress=False)
    close(end(problem), before)


def test_the_outermost_level_has_no_warm_up() -> None:
    with pytest.raises(mlopt.ProblemError, match=r"level 'decay': warmup=2, but only levels inside another"):
        make({"data": [], "optimizer": adam}, {"data": [], "optimizer": adam, "warmup": 2})


def test_a_level_moves_its_module_and_its_batches() -> None:
    """The device is `meta`, which every machine has."""
    module, batch = nn.Linear(2, 1), torch.ones(3, 2)
    level = Level("net", module, lambda own, batch: own(batch).mean(), data=[batch], device="meta")
    assert {p.device.type for p in module.parameters()} == {level.device.type} == {"meta"}
    assert mlopt.problem.Stream("net", level.data, 0, level.device).next().device.type == "meta"
    assert batch.device.type == "cpu"
    still = Level("net", variables(torch.ones(2)), lambda own, batch: own().sum(), device=torch.device("cpu"))
    assert still.device.type == "cpu"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"name": "not a name"}, r"Level: name='not a name'; it must be a valid Python name"),
        ({"name": "class"}, r"Level: name='class'"),
        ({"name": "evaluation"}, r"Level: name='evaluation', which names the columns of `evaluate`"),
        ({"module": torch.ones(2)}, r"level 'x': module=tensor.*mlopt\.variables"),
        ({"loss": 3}, r"the loss of level 'x' is 3, which is not callable"),
        ({"loss": lambda own: own().sum()}, r"the loss of level 'x' takes 1 required positional"),
        ({"data": 3}, r"level 'x': data=3 is a int that cannot be iterated"),
        ({"data": torch.ones(2)}, r"level 'x': data is a tensor"),
        ({"data": iter([1])}, r"level 'x': data is a list_iterator that can be iterated only once"),
        ({"optimizer": "adam"}, r"level 'x': optimizer='adam', which is not callable"),
        ({"scheduler": 3}, r"level 'x': scheduler=3, which is not callable"),
        ({"scheduler": StepLR(SGD([nn.Parameter(torch.ones(1))], lr=0.1), 1)}, r"level 'x': scheduler=<.*StepLR"),
        ({"steps": 0}, r"level 'x': steps=0; it must be a whole number >= 1"),
        ({"steps": True}, r"level 'x': steps=True"),
        ({"warmup": -1}, r"level 'x': warmup=-1; it must be a whole number >= 0"),
        ({"accumulate": 0}, r"level 'x': accumulate=0"),
        ({"accumulate": 1.5}, r"level 'x': accumulate=1\.5"),
        ({"clip": 0.0}, r"level 'x': clip=0\.0; it must be a finite number > 0"),
        ({"clip": float("nan")}, r"level 'x': clip=nan"),
        ({"clip": float("inf")}, r"level 'x': clip=inf"),
        ({"clip": "1"}, r"level 'x': clip='1'"),
        ({"precision": "float16"}, r"level 'x': precision='float16'; it must be 'bf16', 'fp16' or None"),
        ({"device": "gpu"}, r"Level: device='gpu' is not a device"),
        ({"device": 1.5}, r"Level: device=1\.5 is not a device"),
        ({"device": "ipu"}, r"level 'x': device='ipu'; its module cannot be moved there"),
        ({"estimator": "identity"}, r"level 'x': estimator='identity' is a str; give an estimator"),
        ({"regularizer": 0.1}, r"the regularizer of level 'x' is 0\.1, which is not callable"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_invalid_argument_of_a_level_is_named(arguments: dict[str, Any], sentence: str) -> None:
    good = {"name": "x", "module": variables(torch.ones(1)), "loss": lambda own, batch: own().sum()}
    with pytest.raises(mlopt.ProblemError, match=sentence):
        Level(**{**good, **arguments})
