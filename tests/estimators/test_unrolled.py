"""Unrolled steps: equal to torch's own, exact in reverse, and gone afterwards."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import pytest
import torch
from core_cases import PRODUCTS, Restless, distance, drawn, gradient_of, point_of, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, RMSprop

import mlopt
from mlopt.hypergradient import at_solutions
from mlopt.problem import Carryover
from mlopt.testing import SHAPES, quadratic

torchopt = pytest.importorskip("torchopt")

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(SGD, lr=0.2),
    "momentum": partial(SGD, lr=0.1, momentum=0.9),
    "dampened": partial(SGD, lr=0.2, momentum=0.9, dampening=0.4),
    "nesterov": partial(SGD, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.1),
    "decay": partial(SGD, lr=0.1, weight_decay=0.2, maximize=True),
    "adam": partial(Adam, lr=0.05),
    "adam_decay": partial(Adam, lr=0.05, betas=(0.7, 0.9), eps=1e-3, weight_decay=0.1),
    "adamw": partial(AdamW, lr=0.05, weight_decay=0.3),
    "adamw_maximize": partial(AdamW, lr=0.05, maximize=True),
}


class Net(nn.Module):
    """A small network with a parameter that nothing uses, and a frozen one."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
            self.unused, self.frozen = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(1), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.frozen * self.body(inputs)).squeeze(1)


def training_loss(net: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
    inputs, targets = batch
    return (weights().sigmoid() * (net(inputs) - targets).square()).mean()


def validation_loss(weights: nn.Module, batch: Any, *, net: Net) -> Tensor:
    inputs, targets = batch
    return (net(inputs) - targets).square().mean() + net.unused.square().sum() + 0.1 * weights().square().sum()


def build(
    seed: int, estimator: mlopt.Estimator, optimizer: Any = None, *, net: nn.Module | None = None
) -> mlopt.Problem:
    generator = torch.Generator().manual_seed(seed)
    training, validation = ((torch.randn(4, 2, generator=generator), torch.randn(4, generator=generator)) for _ in "ab")
    weights = mlopt.variables(torch.randn(4, generator=generator))
    return mlopt.Problem(
        mlopt.Level("weights", weights, validation_loss, data=[validation], optimizer=partial(SGD, lr=0.1)),
        mlopt.Level(
            "net", net or Net(seed), training_loss, data=[training], estimator=estimator, optimizer=optimizer, steps=2
        ),
    )


def real_steps(problem: mlopt.Problem, optimizer: torch.optim.Optimizer, steps: int, name: str = "net") -> None:
    """Take steps of a real optimiser of the level."""
    level = problem[name]
    for _ in range(steps):
        optimizer.zero_grad()
        others = {reference: problem[reference].module for reference in level.references}
        batch = None if level.data is None else level.data[0]
        level.loss(level.module, batch, **others).backward(inputs=list(level.parameters))
        optimizer.step()


def outer_value(problem: mlopt.Problem, steps: int) -> Tensor:
    """Return F(u, x_T(u)), by steps of torch's own optimisers on a copy."""
    problem = copy.deepcopy(problem)
    optimizer = problem["net"].optimizer
    optimizer = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer(problem["net"].parameters)
    real_steps(problem, optimizer, steps)
    outer = problem["weights"]
    return outer.loss(outer.module, outer.data[0], net=problem["net"].module).detach()


def differences(function: Callable[[], Tensor], variable: Tensor, step: float = 2e-5) -> Tensor:
    """Return the gradient of a function of a live variable by central differences at two steps, extrapolated to none.

    One step of Adam bends over the size of its gradient, which may be small: one difference is off by 5e-6 there.
    """
    wide, narrow = (_differences(function, variable, size) for size in (step, step / 2))
    return (4 * narrow - wide) / 3


def _differences(function: Callable[[], Tensor], variable: Tensor, step: float) -> Tensor:
    gradient = torch.zeros_like(variable)
    for index in range(variable.numel()):
        values = []
        kept = variable.detach().clone()
        for sign in (1, -1):
            variable.data.view(-1)[index] += sign * step
            values.append(function())
            variable.data.copy_(kept)
        gradient.view(-1)[index] = (values[0] - values[1]) / (2 * step)
    return gradient


@pytest.mark.parametrize("name", OPTIMIZERS)
@drawn(4)
@given(seed=seeds, steps=st.integers(1, 5))
def test_virtual_steps_are_those_of_torch(name: str, seed: int, steps: int) -> None:
    """From a fresh optimiser and from one at work, whose state some parameters may lack."""
    for warmed in (0, 2):
        problem = build(seed, mlopt.Unrolled(steps=steps), OPTIMIZERS[name])
        optimizer = OPTIMIZERS[name](problem["net"].parameters)
        real_steps(problem, optimizer, warmed)
        point = point_of(problem)
        point.carryover = Carryover(optimizers={"net": optimizer})
        with at_solutions(point, problem.outermost):
            virtual = [p.detach().clone() for p in problem["net"].parameters]
        real_steps(problem, optimizer, steps)
        for value, expected in zip(virtual, problem["net"].parameters, strict=True):
            torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
@drawn(3)
@given(seed=seeds, steps=st.integers(1, 6), every=st.sampled_from([1, 2, None]))
def test_the_hypergradient_is_the_derivative_through_the_steps(name: str, seed: int, steps: int, every: Any) -> None:
    problem = build(seed, mlopt.Unrolled(steps=steps, checkpoint_every=every), OPTIMIZERS[name])
    result = mlopt.hypergradient(problem)
    torch.testing.assert_close(result.loss, outer_value(problem, steps), rtol=1e-12, atol=0)
    expected = differences(lambda: outer_value(problem, steps), problem["weights"].module.value)
    assert distance(result.gradient["value"], expected) < 1e-6


@pytest.mark.parametrize("name", ["momentum", "dampened", "adam", "adamw"])
def test_an_optimizer_at_work_is_gone_on_from(name: str) -> None:
    problem = build(3, mlopt.Unrolled(steps=4))
    optimizer = OPTIMIZERS[name](problem["net"].parameters)
    real_steps(problem, optimizer, 3)
    optimizer.param_groups[0]["lr"] *= 0.5
    problem = build(3, mlopt.Unrolled(steps=4), optimizer, net=problem["net"].module)
    gradient, fresh = (
        gradient_of(problem),
        gradient_of(build(3, mlopt.Unrolled(steps=4), OPTIMIZERS[name], net=problem["net"].module)),
    )
    expected = differences(lambda: outer_value(problem, 4), problem["weights"].module.value)
    assert distance(gradient, expected) < 1e-6
    assert distance(fresh, expected) > 1e-3


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_products_and_checkpoints_change_nothing(name: str, products: str) -> None:
    reference = gradient_of(build(1, mlopt.Unrolled(steps=7, checkpoint_every=1), OPTIMIZERS[name]))
    for every in (1, 2, 3, 7, 20, None):
        estimator = mlopt.Unrolled(steps=7, checkpoint_every=every, products=products)
        gradient = gradient_of(build(1, estimator, OPTIMIZERS[name]))
        assert distance(gradient, reference) < (1e-6 if products == "finite_difference" else 1e-12)


def solved_by_steps(problem: mlopt.Problem, steps: int) -> Tensor:
    """Return the outer loss after steps of each inner level, each level after those that it refers to."""
    problem = copy.deepcopy(problem)
    for name in reversed(problem.graph[problem.outermost.name].parts):
        real_steps(problem, problem[name].optimizer(problem[name].parameters), steps, name)
    outer = problem.outermost
    others = {name: problem[name].module for name in outer.references}
    return outer.loss(outer.module, None, **others).detach()


@pytest.mark.parametrize("shape", [name for name in SHAPES if not name.startswith("nested") and "ladder" not in name])
@drawn(3)
@given(seed=seeds, every=st.sampled_from([1, 2]))
def test_chains_and_diamonds_of_unrolled_levels(shape: str, seed: int, every: int) -> None:
    """A level's steps see those it refers to where their own steps have led, and each is pulled back once."""
    case = quadratic(shape, mlopt.Unrolled(steps=3, checkpoint_every=every), seed=seed, size=1)
    levels = [
        mlopt.Level(
            level.name,
            level.module,
            level.loss,
            estimator=level.estimator,
            optimizer=partial(SGD, lr=0.1, momentum=0.5),
        )
        for level in case.problem
    ]
    problem = mlopt.Problem(*levels)
    with torch.no_grad():
        for level in levels:
            level.module.weight.add_(0.3)
    result = mlopt.hypergradient(problem)
    for name, parameter in problem.outermost.module.named_parameters():
        expected = differences(lambda: solved_by_steps(problem, 3), parameter)
        torch.testing.assert_close(result.gradient[name], expected, rtol=1e-7, atol=1e-8)
    assert {report.iterations for report in result.reports.values()} == {3}


def test_many_steps_are_the_implicit_derivative() -> None:
    case = quadratic("two", mlopt.Unrolled(steps=400, optimizer=torchopt.sgd(0.3)), seed=2)
    assert case.error(mlopt.hypergradient(case.problem).gradient) < 1e-8


def test_a_level_beside_an_implicit_one() -> None:
    """The implicit level's pullback is taken where the unrolled one's steps lead."""
    rules = {"x": None, "y": mlopt.Unrolled(steps=3, optimizer=torchopt.sgd(0.1)), "z": mlopt.Dense()}
    case = quadratic("chain_of_three", rules, seed=5)
    # From its solution, gradient descent goes nowhere, and the truncation shows in the last link only.
    mixed = mlopt.hypergradient(case.problem)
    neumann = rules | {"y": mlopt.Neumann(iterations=2, step_size=0.1)}
    expected = mlopt.hypergradient(quadratic("chain_of_three", neumann, seed=5).problem)
    for name, gradient in expected.gradient.items():
        torch.testing.assert_close(mixed.gradient[name], gradient, rtol=1e-10, atol=1e-12)


@drawn(4)
@given(seed=seeds, name=st.sampled_from(["sgd", "momentum", "adam"]))
def test_steps_from_another_levels_variables_are_maml(seed: int, name: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = [(torch.randn(4, 2, generator=generator), torch.randn(4, generator=generator)) for _ in "ab"]

    def adapt(net: nn.Module, batch: Any, *, initial: nn.Module) -> Tensor:
        return (net(batch[0]) - batch[1]).square().mean()

    def query(net: nn.Module, batch: Any, *, adapted: nn.Module) -> Tensor:
        return (adapted(batch[0]) - batch[1]).square().mean() + 0.1 * net(batch[0]).square().mean()

    initial, factory = Net(seed), OPTIMIZERS[name]
    elsewhere = copy.deepcopy(initial)
    with torch.no_grad():
        for parameter in elsewhere.body.parameters():
            parameter.add_(1.0)
    problem = mlopt.Problem(
        mlopt.Level("initial", initial, query, data=batches[:1]),
        mlopt.Level(
            "adapted",
            elsewhere,
            adapt,
            data=batches[1:],
            optimizer=factory,
            estimator=mlopt.Unrolled(steps=3, start="initial"),
        ),
    )

    def value() -> Tensor:
        adapted = copy.deepcopy(initial)
        optimizer = factory(p for p in adapted.parameters() if p.requires_grad)
        for _ in range(3):
            optimizer.zero_grad()
            adapt(adapted, batches[1], initial=initial).backward()
            optimizer.step()
        return query(initial, batches[0], adapted=adapted).detach()

    result = mlopt.hypergradient(problem)
    torch.testing.assert_close(result.loss, value(), rtol=1e-12, atol=0)
    assert not result.reports["adapted"].doubtful  # its loss need not use the level that the steps start from
    for parameter_name, parameter in zip(result.gradient, problem["initial"].parameters, strict=True):
        torch.testing.assert_close(result.gradient[parameter_name], differences(value, parameter), rtol=1e-6, atol=1e-7)


def two(estimator: mlopt.Estimator, optimizer: Any, inner: Callable[..., Tensor]) -> mlopt.Problem:
    def outer(x: nn.Module, batch: None, *, y: nn.Module) -> Tensor:
        return (y() * torch.tensor([1.0, 2.0])).sum()

    return mlopt.Problem(
        mlopt.Level("x", mlopt.variables(torch.tensor([0.5, 0.7])), outer),
        mlopt.Level("y", mlopt.variables(torch.tensor([0.3, -0.2])), inner, estimator=estimator, optimizer=optimizer),
    )


def half_idle(y: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
    """Its second component has a gradient of exactly zero, as a dead unit's weights have."""
    return (y()[0] - x()[0]).square() + torch.relu(y()[1] - 10.0) * x()[1]


def half_solved(y: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
    """Its second component stands where its gradient is zero and its curvature is not."""
    return (y()[0] - x()[0]).square() + (y()[1] - y()[1].detach()).square() * x()[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("loss", [half_idle, half_solved])
@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_adam_is_differentiable_at_a_zero_gradient(kind: Any, loss: Any, dtype: torch.dtype) -> None:
    problem = two(mlopt.Unrolled(steps=3), partial(kind, lr=0.1, weight_decay=0.0), loss)
    for level in problem:
        level.module.to(dtype)
    gradient = mlopt.hypergradient(problem).gradient["value"]
    assert torch.isfinite(gradient).all()
    assert gradient[0] != 0
    assert gradient[1] == 0


def test_a_given_adam_without_a_guard_is_named() -> None:
    problem = two(mlopt.Unrolled(steps=2, optimizer=torchopt.adam(0.1)), None, half_solved)
    with pytest.raises(mlopt.NonFiniteError, match="level 'y'"):
        mlopt.hypergradient(problem)
    guarded = two(mlopt.Unrolled(steps=2, optimizer=torchopt.adam(0.1, eps_root=1e-300)), None, half_solved)
    assert torch.isfinite(mlopt.hypergradient(guarded).gradient["value"]).all()


@pytest.mark.parametrize("given", [False, True])
def test_a_given_transformation_is_the_same_every_time(given: bool) -> None:
    """TorchOpt's momentum treats its first call ever unlike later ones, which a pullback that steps again would see."""
    optimizer = torchopt.sgd(0.1, momentum=0.9, dampening=0.5) if given else None
    problem = build(4, mlopt.Unrolled(steps=5, checkpoint_every=2, optimizer=optimizer), OPTIMIZERS["dampened"])
    first, second = gradient_of(problem, seed=0), gradient_of(problem, seed=0)
    assert torch.equal(first, second)


def quadratic_loss(y: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
    return (y() - x()).square().sum()


def misplaced(y: nn.Module, batch: None) -> Tensor:
    return y().square().sum()


@pytest.mark.parametrize(
    ("estimator", "optimizer", "sentence"),
    [
        (mlopt.Unrolled(steps=2), None, r"level 'y': optimizer=None"),
        (
            mlopt.Unrolled(steps=2),
            partial(RMSprop, lr=0.1),
            "virtual steps of RMSprop, only of torch.optim's SGD, Adam and AdamW",
        ),
        (mlopt.Unrolled(steps=2), partial(Adam, amsgrad=True), "Adam with amsgrad"),
        (mlopt.Unrolled(steps=2, start="z"), partial(SGD, lr=0.1), "does not refer to 'z'"),
    ],
)
def test_what_cannot_be_unrolled_is_refused(estimator: mlopt.Estimator, optimizer: Any, sentence: str) -> None:
    with pytest.raises(mlopt.EstimatorError, match=sentence):
        mlopt.hypergradient(two(estimator, optimizer, quadratic_loss))


def test_a_start_of_other_shapes_is_refused() -> None:
    problem = two(mlopt.Unrolled(steps=2, start="x"), partial(SGD, lr=0.1), quadratic_loss)
    problem["x"].module.value = nn.Parameter(torch.ones(1))
    with pytest.raises(mlopt.EstimatorError, match=r"shapes \[\(1,\)\], not \[\(2,\)\]"):
        mlopt.hypergradient(problem)


@pytest.mark.parametrize(
    "arguments", [{"steps": 0}, {"checkpoint_every": 1.5}, {"checkpoint_every": 0}, {"products": "other"}]
)
def test_arguments_are_checked(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        mlopt.Unrolled(**arguments)
    with pytest.raises(mlopt.EstimatorError, match="give a TorchOpt transformation"):
        mlopt.Unrolled(optimizer=partial(SGD, lr=0.1))


@pytest.mark.parametrize("level", ["y", "z"])
def test_nests_are_refused(level: str) -> None:
    rules = {"y": mlopt.Dense(), "z": mlopt.Dense()} | {level: mlopt.Unrolled(steps=2, optimizer=torchopt.sgd(0.1))}
    with pytest.raises(mlopt.EstimatorError, match=level):
        mlopt.hypergradient(quadratic("nested", rules).problem)


def test_divergence_is_said() -> None:
    problem = two(mlopt.Unrolled(steps=8, optimizer=torchopt.sgd(4.0)), None, quadratic_loss)
    assert "diverge" in mlopt.hypergradient(problem).reports["y"].remarks[0]
    problem = two(mlopt.Unrolled(steps=800, optimizer=torchopt.sgd(4.0)), None, quadratic_loss)
    with pytest.raises(mlopt.NonFiniteError, match="level 'y': 800 virtual steps"):
        mlopt.hypergradient(problem)


def test_zero_in_zero_out_without_an_evaluation() -> None:
    problem = two(mlopt.Unrolled(steps=3), partial(SGD, lr=0.1), quadratic_loss)
    rule = problem["y"].estimator.linearize(point_of(problem), "y")
    assert not rule.pullback({"y": (torch.zeros(2),)})["x"][0].any()
    assert rule.report.iterations == 0
    # And by itself, without virtual steps, it is the same derivative.
    pulled = rule.pullback({"y": (torch.tensor([1.0, 2.0]),)})["x"][0]
    assert distance(pulled, gradient_of(problem)) < 1e-12
    assert torch.equal(problem["y"].module.value.detach(), torch.tensor([0.3, -0.2]))


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_training_inside_solve_does_not_depend_on_the_estimator(name: str) -> None:
    """With an outer step of nothing, the inner levels train alike: parameters, buffers, momenta, and what comes after."""
    ends = []
    for estimator in (mlopt.Identity(), mlopt.Unrolled(steps=3), mlopt.Unrolled(steps=4, checkpoint_every=2)):
        net = Restless()
        optimizer = OPTIMIZERS[name](net.parameters())
        problem = build(0, estimator, optimizer, net=net)
        outer = problem["weights"]
        still = mlopt.Level("weights", outer.module, outer.loss, data=outer.data, optimizer=partial(SGD, lr=0.0))
        mlopt.solve(mlopt.Problem(still, problem["net"]), 4, seed=0, progress=False)
        assert torch.isfinite(outer.module.value.grad).all()
        assert outer.module.value.grad.any()
        moments = [value for p in net.parameters() for value in optimizer.state[p].values()]
        ends.append([*net.state_dict().values(), *moments, torch.rand(1)])
    for other in ends[1:]:
        assert len(other) == len(ends[0])
        assert all(torch.equal(a, b) for a, b in zip(ends[0], other, strict=True))


def test_the_outer_loss_draws_what_it_would_without_the_steps() -> None:
    problem = build(0, mlopt.Unrolled(steps=3), OPTIMIZERS["sgd"], net=Restless())
    before = torch.get_rng_state()
    with at_solutions(point_of(problem), problem.outermost):
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_inside_solve_the_steps_go_on_from_the_momenta(name: str) -> None:
    made: list[torch.optim.Optimizer] = []

    def factory(parameters: Any) -> torch.optim.Optimizer:
        made.append(OPTIMIZERS[name](parameters))
        return made[-1]

    problem = build(1, mlopt.Unrolled(steps=3), factory)
    before = problem["weights"].module.value.detach().clone()
    mlopt.solve(problem, 1, seed=0, progress=False)
    gradient = problem["weights"].module.value.grad.clone()
    problem["weights"].module.value.data.copy_(before)
    problem = mlopt.Problem(problem["weights"], attrs.evolve(problem["net"], optimizer=made[0]))
    expected = differences(lambda: outer_value(problem, 3), problem["weights"].module.value)
    assert distance(gradient, expected) < 1e-6


@pytest.mark.parametrize("products", PRODUCTS)
def test_nothing_moves_when_a_loss_raises(products: str) -> None:
    calls = fatal = 0

    def failing(net: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == fatal:
            raise RuntimeError("stop here")
        return training_loss(net, batch, weights=weights)

    while fatal < 6:
        calls, fatal, net = 0, fatal + 1, Restless()
        problem = build(0, mlopt.Unrolled(steps=3, checkpoint_every=2, products=products), OPTIMIZERS["adam"], net=net)
        level = problem["net"]
        broken = mlopt.Level("net", net, failing, data=level.data, optimizer=level.optimizer, estimator=level.estimator)
        before, generator = copy.deepcopy(net.state_dict()), torch.get_rng_state()
        # A check of products does not fail if only its own evaluations do.
        with contextlib.suppress(RuntimeError):
            mlopt.hypergradient(mlopt.Problem(problem["weights"], broken))
        assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
        assert torch.equal(generator, torch.get_rng_state())


def test_a_part_of_the_loss_that_reads_parameters_from_outside_is_refused() -> None:
    """However small that part is."""
    module = nn.Module()
    module.w, module.z = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    alias = [module.z]

    def inner(module: nn.Module, batch: Any, *, u: nn.Module) -> Tensor:
        return 1e4 * (module.w - u()).square().sum() + 1e-3 * (alias[0] * u()).sum() + 1e-3 * alias[0].square().sum()

    def outer(u: nn.Module, batch: Any, *, inner: nn.Module) -> Tensor:
        return inner.w.square().sum() + 1e3 * inner.z.square().sum()

    problem = mlopt.Problem(
        mlopt.Level("u", mlopt.variables(torch.rand(3)), outer),
        mlopt.Level("inner", module, inner, optimizer=partial(SGD, lr=1e-5), estimator=mlopt.Unrolled(steps=3)),
    )
    with pytest.raises(mlopt.EstimatorError, match=r"level 'inner': .* must take its parameters from the module"):
        mlopt.hypergradient(problem)


def test_the_report_counts_the_seconds_of_the_virtual_steps() -> None:
    def slow(module: nn.Module, batch: Any, *, u: nn.Module) -> Tensor:
        time.sleep(0.02)
        return (module() - u()).square().sum()

    problem = mlopt.Problem(
        mlopt.Level("u", mlopt.variables(torch.rand(3)), lambda u, batch, *, x: x().square().sum()),
        mlopt.Level(
            "x", mlopt.variables(torch.rand(3)), slow, optimizer=partial(SGD, lr=0.1), estimator=mlopt.Unrolled(steps=4)
        ),
    )
    assert mlopt.hypergradient(problem).reports["x"].seconds > 6 * 0.02


def test_a_start_of_another_dtype_gets_its_cotangent_in_its_own() -> None:
    def adapted(module: nn.Module, batch: Any, *, start: nn.Module) -> Tensor:
        return (module() - 1.0).square().sum()

    problem = mlopt.Problem(
        mlopt.Level(
            "start", mlopt.variables(torch.rand(3, dtype=torch.float32)), lambda m, batch, *, x: x().square().sum()
        ),
        mlopt.Level(
            "x",
            mlopt.variables(torch.zeros(3, dtype=torch.float64)),
            adapted,
            optimizer=partial(SGD, lr=0.1),
            estimator=mlopt.Unrolled(steps=2, start="start"),
        ),
    )
    result = mlopt.hypergradient(problem)
    value = problem["start"].module.value.detach()
    # x_2 = 1 + 0.8^2 (x_0 - 1)
    expected = 2 * 0.64 * (1 + 0.64 * (value - 1))
    assert result.gradient["value"].dtype == torch.float32
    assert torch.allclose(result.gradient["value"], expected)


@pytest.mark.parametrize("products", ["autograd", "forward", "finite_difference"])
def test_a_scalar_in_float32_keeps_its_dtype(products: str) -> None:
    """Against a hand-written loop of Adam: its count is in float64, and would promote a variable of shape ()."""
    x = torch.tensor(0.7, dtype=torch.float32)

    def inner(y: nn.Module, batch: Any, *, x: nn.Module) -> Tensor:
        # A dot product refuses two dtypes.
        return (torch.stack([y(), y() ** 2]) @ torch.stack([x(), x().sin()])) + y() ** 2

    problem = mlopt.Problem(
        mlopt.Level("x", mlopt.variables(x), lambda x, batch, *, y: y() ** 2),
        mlopt.Level(
            "y",
            mlopt.variables(torch.tensor(0.3, dtype=torch.float32)),
            inner,
            optimizer=partial(Adam, lr=0.05),
            estimator=mlopt.Unrolled(steps=3, products=products),
        ),
    )

    def total(x: Tensor) -> Tensor:
        y, first, second = torch.tensor(0.3), torch.tensor(0.0), torch.tensor(0.0)
        for t in range(1, 4):
            slope = x + 2 * y * x.sin() + 2 * y
            first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
            y = y - 0.05 * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        return y**2

    gradient = mlopt.hypergradient(problem).gradient["value"]
    assert gradient.dtype == torch.float32
    assert float(gradient) == pytest.approx(float(torch.func.grad(total)(x.double())), rel=1e-2)
