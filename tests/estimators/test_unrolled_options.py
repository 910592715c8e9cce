"""Virtual steps of tasks at once, on fresh batches and at learned rates, against differentiable loops written by hand."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import torchopt
from core_cases import distance, drawn, flat, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, TensorDataset

import mlopt
from mlopt.testing import same, snapshot, stateful_problem

TASKS, STEPS = 3, 4
OPTIMIZERS = {"sgd": partial(SGD, lr=1.0), "adam": partial(Adam, lr=1.0)}
#: The shape of a tensor of learning rates, from that of a parameter of one task.
SHAPES: dict[str, Any] = {
    "by parameter": lambda own: own,
    "by tensor": lambda own: (),
    "by task": lambda own: (TASKS, *own),
}


class Meta(nn.Module):
    """The start of a network for every task, and a tensor of learning rates for each of its parameters."""

    def __init__(self, seed: int, shape: Any = lambda own: own) -> None:
        super().__init__()
        self.start = network(seed)
        generator = torch.Generator().manual_seed(seed)
        shapes = [shape(tuple(p.shape)) for p in self.start.parameters()]
        self.rates = nn.ParameterList(0.05 + 0.1 * torch.rand(own, generator=generator) for own in shapes)


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))


def support(net: nn.Module, batch: Any, *, meta: nn.Module) -> Tensor:
    return (net(batch[0]).squeeze(-1) - batch[1]).square().mean()


def query(meta: nn.Module, batch: Any, *, net: nn.Module) -> Tensor:
    return (net(batch[0]).squeeze(-1) - batch[1]).square().mean()


def draw(*shape: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, 5, 2, generator=generator), torch.randn(*shape, 5, generator=generator)


def by_hand(kind: str, net: nn.Module, start: list[Tensor], rates: list[Tensor], batches: Any) -> list[Tensor]:
    """Return the end of the steps of SGD or Adam, with a graph back to the start and the rates."""
    names = [name for name, _ in net.named_parameters()]
    x = start
    m, v = ([torch.zeros_like(p) for p in x] for _ in "mv")
    for t, (inputs, targets) in enumerate(batches, start=1):
        outputs = functional_call(net, dict(zip(names, x, strict=True)), (inputs,)).squeeze(-1)
        g = torch.autograd.grad((outputs - targets).square().mean(), x, create_graph=True)
        along = list(g)
        if kind == "adam":
            m = [0.9 * a + 0.1 * b for a, b in zip(m, g, strict=True)]
            v = [0.999 * a + 0.001 * b.square() for a, b in zip(v, g, strict=True)]
            along = [(a / (1 - 0.9**t)) / ((b / (1 - 0.999**t)).sqrt() + 1e-8) for a, b in zip(m, v, strict=True)]
        x = [p - r * a for p, r, a in zip(x, rates, along, strict=True)]
    return x


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("products", ["autograd", "forward"])
@drawn(4)
@given(seed=seeds, fresh=st.booleans(), every=st.sampled_from([1, 2, None]), shape=st.sampled_from(list(SHAPES)))
def test_maml_at_learned_rates_over_tasks_equals_a_loop_written_by_hand(
    kind: str, products: str, seed: int, fresh: bool, every: int | None, shape: str
) -> None:
    meta, asked = Meta(seed, SHAPES[shape]), draw(TASKS, seed=seed + 1)
    batches = [draw(TASKS, seed=seed + k) for k in range(2, 2 + STEPS)]
    problem = problem_of(
        meta, asked, batches, kind, data=batches if fresh else None, checkpoint_every=every, products=products
    )
    result = mlopt.hypergradient(problem)
    parameters, net = list(meta.parameters()), meta.start
    names = [name for name, _ in net.named_parameters()]
    total = torch.zeros(())
    for task in range(TASKS):
        seen = [(a[task], b[task]) for a, b in (batches if fresh else [batches[0]] * STEPS)]
        rates = [r[task] if shape == "by task" else r for r in meta.rates]
        end = by_hand(kind, net, list(net.parameters()), rates, seen)
        outputs = functional_call(net, dict(zip(names, end, strict=True)), (asked[0][task],)).squeeze(-1)
        total = total + (outputs - asked[1][task]).square().mean()
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, parameters)])
    torch.testing.assert_close(result.loss, total.detach(), rtol=1e-12, atol=0)
    assert distance(flat(result.gradient), expected) < 1e-9
    assert not result.reports["net"].remarks


def problem_of(meta: Meta, asked: Any, batches: Any, kind: str, **options: Any) -> mlopt.Problem:
    rule = mlopt.Unrolled(steps=STEPS, start="meta.start", learning_rates="meta.rates", **options)
    net, data = mlopt.stacked(network(9), TASKS), [batches[0]]
    return mlopt.Problem(
        mlopt.Level("meta", meta, mlopt.over_tasks(query), data=[asked], optimizer=partial(SGD, lr=0.1)),
        mlopt.Level("net", net, mlopt.over_tasks(support), data=data, optimizer=OPTIMIZERS[kind], estimator=rule),
    )


def shuffled() -> DataLoader[Any]:
    inputs, targets = draw(12, seed=3)
    return DataLoader(TensorDataset(inputs, targets), TASKS, shuffle=True)


def test_a_resumed_run_takes_the_batches_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    def run(steps: int, folder: str, *, resume: bool = False) -> Tensor:
        problem = problem_of(Meta(0), draw(TASKS, seed=1), [draw(TASKS, seed=2)], "adam", data=shuffled())
        saving = mlopt.Checkpoints(tmp_path / folder, every=1)
        mlopt.solve(problem, steps, seed=0, checkpoint=saving, resume=resume, progress=False)
        return torch.cat([p.detach().reshape(-1) for p in problem["meta"].parameters])

    whole = run(4, "whole")
    run(2, "stopped")
    assert torch.equal(run(4, "stopped", resume=True), whole)


def test_nothing_moves() -> None:
    rule = mlopt.Unrolled(steps=3, data=[None] * 2, optimizer=torchopt.sgd(0.1))
    before = snapshot(problem := stateful_problem(rule))
    mlopt.hypergradient(problem)
    assert same(before, snapshot(problem))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"learning_rates": "meta.start.0"}, r"learning_rates='meta\.start\.0'\), whose parameters have shapes"),
        ({"learning_rates": "meta.rate"}, r"no submodule 'rate' .* it has 'start', 'rates'"),
        ({"start": "other"}, r"its loss does not refer to 'other'; make it one"),
        ({"start": "meta.rates"}, r"whose parameters have shapes .*, not .* may be stacked"),
    ],
)
def test_wrong_places_are_refused(option: dict[str, str], message: str) -> None:
    meta = Meta(0, lambda own: (2, *own))
    problem = problem_of(meta, draw(TASKS, seed=1), [draw(TASKS, seed=2)], "sgd")
    net = attrs.evolve(problem["net"], estimator=mlopt.Unrolled(steps=2, **option))
    with pytest.raises(mlopt.EstimatorError, match=message):
        mlopt.hypergradient(mlopt.Problem(problem["meta"], net))
