"""Virtual steps of tasks at once, on fresh batches and at learned rates, against differentiable loops written by hand."""

from __future__ import annotations

import copy
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


class Heads(nn.Module):
    """Heads of which a batch uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(3, 1) for _ in range(2))

    def forward(self, inputs: Tensor, head: int) -> Tensor:
        return self.heads[head](inputs)


STEPPERS = {
    "sgd": partial(SGD, lr=0.1),
    "momentum": partial(SGD, lr=0.1, momentum=0.9, dampening=0.5),
    "nesterov with decay": partial(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.5),
    "adam": partial(Adam, lr=0.1, eps=0.1),
}


def heads_problem(stepper: Any, order: list[int], seed: int, **options: Any) -> tuple[mlopt.Problem, Any]:
    """Return a problem whose virtual steps use the heads in an order, and its outer loss after the steps of torch."""
    generator = torch.Generator().manual_seed(seed)
    batches = [(*(torch.randn(6, n, generator=generator) for n in (3, 1)), head) for head in order]
    held_out = tuple(torch.randn(6, n, generator=generator) for n in (3, 1))
    torch.manual_seed(seed)
    net = Heads()

    def inner(net: nn.Module, batch: Any, *, weight: nn.Module) -> Tensor:
        return weight().exp() * (net(batch[0], batch[2]) - batch[1]).square().mean()

    def outer(weight: Any, batch: Any, *, net: nn.Module) -> Tensor:
        return sum((net(batch[0], head) - batch[1]).square().mean() for head in (0, 1))

    def end(weight: float) -> float:
        own = copy.deepcopy(net)
        optimizer = stepper(own.parameters())
        for batch in batches:
            optimizer.zero_grad()
            inner(own, batch, weight=lambda: torch.tensor(weight)).backward()
            optimizer.step()
        return float(outer(None, held_out, net=own).detach())

    rule = mlopt.Unrolled(steps=len(order), data=batches, **options)
    problem = mlopt.Problem(
        mlopt.Level("weight", mlopt.variables(torch.zeros(())), outer, data=[held_out]),
        mlopt.Level("net", net, inner, data=batches[:1], optimizer=stepper, estimator=rule),
    )
    return problem, end


@pytest.mark.parametrize("name", STEPPERS)
@drawn(6)
@given(
    seed=seeds,
    order=st.lists(st.sampled_from([0, 1]), min_size=2, max_size=5),
    every=st.sampled_from([1, 2, None]),
    products=st.sampled_from(["autograd", "forward", "finite_difference"]),
)
def test_a_step_moves_the_parameters_that_its_own_batch_uses(
    name: str, seed: int, order: list[int], every: int | None, products: str
) -> None:
    problem, end = heads_problem(STEPPERS[name], order, seed, checkpoint_every=every, products=products)
    result = mlopt.hypergradient(problem)
    assert float(result.loss) == pytest.approx(end(0.0), rel=1e-12)
    expected = (end(1e-5) - end(-1e-5)) / 2e-5
    assert float(result.gradient["value"]) == pytest.approx(expected, rel=1e-5, abs=1e-8)
    assert not result.reports["net"].remarks


def test_a_step_moves_the_parameters_that_values_select() -> None:
    """The second step uses the second weight, because the first step made the first one positive."""

    def inner(x: nn.Module, batch: Any, *, u: nn.Module) -> Tensor:
        own = x.first if x.first.item() < 0 else x.second
        return (own - u()).square() / 2

    module = nn.Module()
    module.first, module.second = (nn.Parameter(torch.tensor(value)) for value in (-0.5, 3.0))
    problem = mlopt.Problem(
        mlopt.Level("u", mlopt.variables(torch.tensor(1.0)), lambda u, batch, *, x: x.first + 10 * x.second),
        mlopt.Level("x", module, inner, optimizer=partial(SGD, lr=0.5), estimator=mlopt.Unrolled(steps=3)),
    )
    # first = (-0.5 + u) / 2, and second = 3 / 4 + 3 u / 4 after two steps.
    result = mlopt.hypergradient(problem)
    assert float(result.loss) == pytest.approx(0.25 + 10 * 1.5, rel=1e-12)
    assert float(result.gradient["value"]) == pytest.approx(0.5 + 7.5, rel=1e-12)


def test_a_given_transformation_refuses_parameters_that_are_idle_in_some_steps() -> None:
    problem, _ = heads_problem(partial(SGD, lr=0.1), [0, 1], 0, optimizer=torchopt.sgd(0.1))
    with pytest.raises(mlopt.EstimatorError, match="uses other parameters in some virtual steps than in others"):
        mlopt.hypergradient(problem)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("products", ["autograd", "forward", "finite_difference"])
def test_a_start_keeps_its_variables_where_they_are(products: str, steps: int) -> None:
    """A loss that depends on the start in another way than by a difference shows variables that are moved together."""

    def inner(net: nn.Module, batch: Any, *, meta: nn.Module) -> Tensor:
        pairs = zip(net.parameters(), meta.parameters(), strict=True)
        return support(net, batch, meta=meta) + 0.3 * sum((p * q.sin()).sum() for p, q in pairs)

    meta, (inputs, targets), asked = network(1), draw(seed=2), draw(seed=3)
    rule = mlopt.Unrolled(steps=steps, start="meta", products=products)
    problem = mlopt.Problem(
        mlopt.Level("meta", meta, query, data=[asked]),
        mlopt.Level("net", network(9), inner, data=[(inputs, targets)], optimizer=partial(SGD, lr=0.1), estimator=rule),
    )
    result = mlopt.hypergradient(problem)
    start = list(meta.parameters())
    names, x = [name for name, _ in meta.named_parameters()], [p.clone() for p in start]
    for _ in range(steps):
        outputs = functional_call(meta, dict(zip(names, x, strict=True)), (inputs,)).squeeze(-1)
        value = (outputs - targets).square().mean()
        value = value + 0.3 * sum((p * q.sin()).sum() for p, q in zip(x, start, strict=True))
        x = [p - 0.1 * g for p, g in zip(x, torch.autograd.grad(value, x, create_graph=True), strict=True)]
    outputs = functional_call(meta, dict(zip(names, x, strict=True)), (asked[0],)).squeeze(-1)
    expected = flat(dict(enumerate(torch.autograd.grad((outputs - asked[1]).square().mean(), start))))
    assert distance(flat(result.gradient), expected) < (1e-7 if products == "finite_difference" else 1e-12)
    assert not result.reports["net"].remarks


class Afresh(mlopt.Callback):
    """Draws the parameters of a network in each outer step, and keeps the hypergradients."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_step_begin(self, run: Any) -> None:
        run.problem["net"].module.load_state_dict(network(run.step).state_dict())

    def on_step_end(self, run: Any) -> None:
        self.seen.append(run.problem["images"].module.value.grad.clone())


def test_a_level_that_begins_anew_in_each_outer_step() -> None:
    """Dataset distillation: the outer variables are the training examples."""
    asked, labels = draw(seed=4), torch.tensor([0.5, -1.0])

    def inner(net: nn.Module, batch: Any, *, images: nn.Module) -> Tensor:
        return (net(images()).squeeze(-1) - labels).square().mean()

    def outer(images: nn.Module, batch: Any, *, net: nn.Module) -> Tensor:
        return (net(batch[0]).squeeze(-1) - batch[1]).square().mean()

    start = torch.tensor([[0.3, -0.2], [1.0, 0.4]])
    rule = mlopt.Unrolled(steps=4, optimizer=torchopt.sgd(0.1))
    problem = mlopt.Problem(
        mlopt.Level("images", mlopt.variables(start), outer, data=[asked], optimizer=partial(SGD, lr=0.2)),
        mlopt.Level("net", network(9), inner, optimizer=partial(SGD, lr=0.0), estimator=rule),
    )
    mlopt.solve(problem, steps=3, callbacks=[afresh := Afresh()], progress=False)
    images = start.clone().requires_grad_()
    for step, seen in enumerate(afresh.seen):
        net = network(step)
        names, x = [name for name, _ in net.named_parameters()], list(net.parameters())
        for _ in range(4):
            outputs = functional_call(net, dict(zip(names, x, strict=True)), (images,)).squeeze(-1)
            slopes = torch.autograd.grad((outputs - labels).square().mean(), x, create_graph=True)
            x = [p - 0.1 * g for p, g in zip(x, slopes, strict=True)]
        outputs = functional_call(net, dict(zip(names, x, strict=True)), (asked[0],)).squeeze(-1)
        (expected,) = torch.autograd.grad((outputs - asked[1]).square().mean(), images)
        assert distance(seen, expected) < 1e-10
        images = (images - 0.2 * expected).detach().requires_grad_()


def of_part(meta: nn.Module, net: nn.Module, option: str) -> mlopt.Problem:
    """Return a problem whose virtual steps use the part of a module as their start, or as their learning rates."""
    rule = mlopt.Unrolled(steps=1, **{option: "meta.part"})
    return mlopt.Problem(
        mlopt.Level("meta", meta, query, data=[draw(seed=1)]),
        mlopt.Level("net", net, support, data=[draw(seed=2)], optimizer=partial(SGD, lr=0.1), estimator=rule),
    )


@pytest.mark.parametrize("option", ["start", "learning_rates"])
def test_a_part_without_trainable_parameters_is_refused(option: str) -> None:
    meta = Meta(0)
    meta.part = network(1).requires_grad_(False)
    with pytest.raises(mlopt.EstimatorError, match=r"has no trainable parameters; .* if requires_grad is True"):
        mlopt.hypergradient(of_part(meta, network(9), option))


@pytest.mark.parametrize(("option", "normed"), [("start", "meta"), ("start", "net"), ("learning_rates", "meta")])
def test_parametrizations_of_one_of_both_are_refused(option: str, normed: str) -> None:
    """`tests/estimators/products/test_kernels.py` has a start and a level that are parametrized alike."""
    meta, net = Meta(0), network(9)
    meta.part = meta.start
    nn.utils.parametrizations.weight_norm((meta.part if normed == "meta" else net)[0])
    with pytest.raises(mlopt.EstimatorError, match=rf"map those of '{normed}.* use modules without them"):
        mlopt.hypergradient(of_part(meta, net, option))
