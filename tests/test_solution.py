"""Solutions as tensors: their derivatives in reverse and forward mode, in a layer, a chain and a nest; nothing moves."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from core_cases import ESTIMATORS, PRODUCTS, conjugate_gradient, distance, drawn, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD

import mlopt
from mlopt.testing import SHAPES, quadratic
from mlopt.testing.side_effects import same, snapshot, stateful_problem, train_a_little

EXACT = {"dense": lambda products: mlopt.Dense(products=products), "conjugate gradient": conjugate_gradient}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Ridge:
    """argmin_w ||X w - y||^2 + sum_k exp(a_k) w_k^2, with y a function of another level: closed form and level."""

    def __init__(self, seed: int, estimator: mlopt.Estimator | None = None, **options: Any) -> None:
        self.inputs = normal(seed, 6, 3)

        def loss(module: nn.Module, batch: Tensor, *, decay: nn.Module, targets: nn.Module) -> Tensor:
            return (batch @ module() - targets()).square().sum() + (decay().exp() * module().square()).sum()

        def solver(module: nn.Module, batch: Tensor, *, decay: nn.Module, targets: nn.Module) -> None:
            module.value.data.copy_(self.solution(decay().detach(), targets().detach()))

        options = options or {"solver": solver}
        start = mlopt.variables(torch.zeros(3, dtype=torch.float64))
        self.level = mlopt.Level(
            "weights", start, loss, data=[self.inputs], estimator=estimator or mlopt.Dense(), **options
        )

    def solution(self, decay: Tensor, targets: Tensor) -> Tensor:
        return torch.linalg.solve(self.inputs.T @ self.inputs + decay.exp().diag(), self.inputs.T @ targets)

    def layer(self, decay: Tensor, targets: Tensor) -> Tensor:
        solved = mlopt.solution(self.level, values={"decay": decay, "targets": targets})
        return solved.variables["value"]


@drawn(10)
@given(seeds, st.sampled_from(PRODUCTS), st.sampled_from(sorted(EXACT)))
def test_both_modes_are_those_of_the_closed_form(seed: int, products: str, name: str) -> None:
    case = Ridge(seed, EXACT[name](products))
    decay, targets = normal(seed + 1, 3).requires_grad_(), normal(seed + 2, 6).requires_grad_()
    directions, cotangent = (normal(seed + 3, 3), normal(seed + 4, 6)), normal(seed + 5, 3)
    own, closed = case.layer(decay, targets), case.solution(decay, targets)
    assert torch.equal(own, closed)
    for ours, expected in zip(
        *(torch.autograd.grad(x, (decay, targets), cotangent) for x in (own, closed)), strict=True
    ):
        assert distance(ours, expected) < 1e-8
    if products == "forward":  # torch does not nest forward mode
        return
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x.detach(), t) for x, t in zip((decay, targets), directions, strict=True)]
        pushed, expected = (forward_ad.unpack_dual(f(*duals)).tangent for f in (case.layer, case.solution))
    assert distance(pushed, expected) < 1e-8


def test_a_solution_is_a_layer_of_a_network() -> None:
    """The same parameters as with the closed form in its place, after steps of training."""
    ends = []
    for layer in (Ridge(0).layer, Ridge(0).solution):
        torch.manual_seed(0)
        before, after = nn.Linear(4, 9).double(), nn.Linear(3, 1).double()
        parameters = [*before.parameters(), *after.parameters()]
        optimizer, inputs = SGD(parameters, lr=0.1), normal(7, 4)
        for _ in range(5):
            decay, targets = before(inputs).split([3, 6])
            optimizer.zero_grad()
            (after(layer(decay, targets)) - 1.0).square().sum().backward()
            optimizer.step()
        ends.append(torch.cat([parameter.detach().reshape(-1) for parameter in parameters]))
    assert distance(*ends) < 1e-10


@pytest.mark.parametrize("shape", SHAPES)
def test_solutions_chain(shape: str) -> None:
    """Each level's solution at those of the levels that it refers to: autograd accumulates what `hypergradient` does."""
    case = quadratic(shape, mlopt.Dense())
    problem, outermost = case.problem, case.problem.outermost
    values: dict[str, dict[str, Tensor]] = {}
    waiting = [level.name for level in problem.levels[1:]]
    while waiting:
        arguments = {name: set(problem.graph[name].arguments) - {outermost.name} for name in waiting}
        name = next(name for name in waiting if arguments[name] <= set(values))
        waiting.remove(name)
        known = {argument: values[argument] for argument in arguments[name]}
        values[name] = mlopt.solution(problem, name, values=known, steps=0).variables
    modules = {name: Given(values[name], problem[name].module) for name in outermost.references}
    gradient = torch.autograd.grad(outermost.loss(outermost.module, None, **modules), outermost.parameters)
    assert case.error(dict(zip(outermost.parameter_names, gradient, strict=True))) < 1e-8


class Given(nn.Module):
    """A module evaluated at other parameters."""

    def __init__(self, values: dict[str, Tensor], module: nn.Module) -> None:
        super().__init__()
        self._values, self._held = values, [module]

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("_values", {})
        return values[name] if name in values else super().__getattr__(name)

    def forward(self, *inputs: Any) -> Any:
        return functional_call(self._held[0], self._values, inputs)


def test_steps_lead_to_the_solution_and_are_reported() -> None:
    """Steps of the level's optimiser, by hand; the report says how far they ended from the solution."""
    case = Ridge(1, optimizer=partial(SGD, lr=0.02))
    decay, targets = torch.zeros(3, dtype=torch.float64, requires_grad=True), normal(2, 6)
    solved = mlopt.solution(case.level, values={"decay": decay, "targets": targets}, steps=7)
    weights = torch.zeros(3, dtype=torch.float64)
    for _ in range(7):
        gradient = 2 * case.inputs.T @ (case.inputs @ weights - targets) + 2 * weights
        weights = weights - 0.02 * gradient
    assert distance(solved.variables["value"].detach(), weights) < 1e-12
    assert not solved.reports
    solved.variables["value"].sum().backward()
    hessian = 2 * (case.inputs.T @ case.inputs + torch.eye(3, dtype=torch.float64))
    assert decay.grad is not None
    assert distance(decay.grad, -2 * weights * torch.linalg.solve(hessian, torch.ones_like(weights))) < 1e-10
    gradient = 2 * case.inputs.T @ (case.inputs @ weights - targets) + 2 * weights
    assert solved.reports["weights"].gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-9)
    assert not case.level.module.value.any()


def test_unrolled_steps_are_differentiated() -> None:
    case = Ridge(3, mlopt.Unrolled(steps=4), optimizer=partial(SGD, lr=0.05, momentum=0.5))
    decay, targets = normal(4, 3).requires_grad_(), normal(5, 6)
    solved = mlopt.solution(case.level, values={"decay": decay, "targets": targets}, steps=0)
    weights, momentum = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for _ in range(4):
        gradient = 2 * case.inputs.T @ (case.inputs @ weights - targets) + 2 * decay.exp() * weights
        momentum = 0.5 * momentum + gradient
        weights = weights - 0.05 * momentum
    own = solved.variables["value"]
    assert distance(own.detach(), weights.detach()) < 1e-12
    cotangent = normal(6, 3)
    pulled, expected = (torch.autograd.grad(x, decay, cotangent)[0] for x in (own, weights))
    assert distance(pulled, expected) < 1e-10


def test_forward_mode_without_a_pushforward_is_refused() -> None:
    options = {"optimizer": partial(SGD, lr=0.05)}
    rules = {
        "has no pushforward": (mlopt.Unrolled(steps=2), options),
        "products='autograd'": (mlopt.Dense(products="forward"), {}),
    }
    for message, (rule, own) in rules.items():
        level = Ridge(3, rule, **own).level
        with forward_ad.dual_level():
            values = {"decay": forward_ad.make_dual(normal(4, 3), normal(5, 3)), "targets": normal(6, 6)}
            with pytest.raises(mlopt.EstimatorError, match=message):
                mlopt.solution(level, values=values, steps=0)


@pytest.mark.parametrize("name", [*ESTIMATORS, "unrolled"])
@pytest.mark.parametrize("steps", [0, 3])
def test_nothing_moves(name: str, steps: int) -> None:
    rule = mlopt.Unrolled(steps=2) if name == "unrolled" else ESTIMATORS[name]("autograd")
    problem = stateful_problem(rule)
    optimizers = train_a_little(problem)
    level = mlopt.Level(
        "network",
        problem["network"].module,
        problem["network"].loss,
        data=problem["network"].data,
        estimator=rule,
        optimizer=partial(SGD, lr=0.01, momentum=0.9),
    )
    problem = mlopt.Problem(problem["weights"], level)
    before = snapshot(problem, optimizers)
    solved = mlopt.solution(problem, "network", steps=steps)
    assert same(before, snapshot(problem, optimizers))
    (gradient,) = torch.autograd.grad(sum(x.sum() for x in solved.variables.values()), problem["weights"].parameters)
    assert gradient.any()
    assert same(before, snapshot(problem, optimizers))


def test_the_derivative_is_that_at_the_place_of_the_call() -> None:
    problem = stateful_problem(mlopt.Dense(damping=1e-3))
    weights, network = problem["weights"], problem["network"]

    def derivative(solved: mlopt.LevelSolution) -> Tensor:
        total = sum(x.sum() for x in solved.variables.values())
        return torch.autograd.grad(total, weights.parameters)[0]

    batch = next(iter(network.data))
    early, late = (mlopt.solution(problem, "network", batches={"network": batch}, seed=0) for _ in range(2))
    expected = derivative(early)
    with torch.no_grad():
        for variable in (*weights.parameters, *network.parameters):
            variable.add_(0.5)
    network.module.zero_grad()
    assert torch.equal(derivative(late), expected)
    again = mlopt.solution(problem, "network", batches={"network": batch}, seed=0)
    assert distance(derivative(again), expected) > 1e-3


def test_a_doubtful_derivative_warns() -> None:
    case = Ridge(0, mlopt.ConjugateGradient(iterations=1, rtol=1e-12))
    decay = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    solved = mlopt.solution(case.level, values={"decay": decay, "targets": normal(1, 6)})
    solved.variables["value"].sum().backward()
    assert solved.reports["weights"].converged is False
    assert solved.reports["weights"].residual > 1e-3


def test_a_second_derivative_is_refused() -> None:
    case = Ridge(0)
    decay = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    own = case.layer(decay, normal(1, 6))
    (first,) = torch.autograd.grad(own.sum(), decay, create_graph=True)
    with pytest.raises(mlopt.EstimatorError, match="cannot be differentiated again"):
        torch.autograd.grad(first.sum(), decay)


@pytest.mark.parametrize(
    "mixed", ["a tangent", "a tangent by its direction", "a gradient", "a cotangent with a tangent"]
)
def test_second_derivatives_of_both_modes_are_refused(mixed: str) -> None:
    """A term without a graph or a tangent would be missing from the sum in silence."""
    case = Ridge(0)
    decay, targets = normal(1, 3).requires_grad_(), normal(2, 6)
    direction = normal(3, 3).requires_grad_(mixed == "a tangent by its direction")
    with forward_ad.dual_level():
        if mixed == "a cotangent with a tangent":
            own, cotangent = case.layer(decay, targets), forward_ad.make_dual(normal(3, 3), normal(4, 3))
        else:
            own = case.layer(forward_ad.make_dual(decay, direction), targets)
            own = own if mixed == "a gradient" else forward_ad.unpack_dual(own).tangent
            cotangent = normal(4, 3)
        by = direction if direction.requires_grad else decay
        with pytest.raises(mlopt.EstimatorError, match="cannot be differentiated again"):
            torch.autograd.grad(own, by, cotangent)


TRANSFORMED: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda layer, x: torch.func.grad(lambda x: layer(x).sum())(x),
    "jvp": lambda layer, x: torch.func.jvp(layer, (x,), (x,)),
    "vmap": lambda layer, x: torch.func.vmap(layer)(torch.stack([x, x])),
    "constant": lambda layer, x: torch.func.grad(lambda y: (y * layer(x)).sum())(x),
    "batched": lambda layer, x: torch.autograd.functional.jacobian(layer, x, vectorize=True),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transforms_of_functions_are_refused(name: str) -> None:
    case, targets = Ridge(0), normal(1, 6)
    with pytest.raises(mlopt.EstimatorError, match=r"torch\.func"):
        TRANSFORMED[name](lambda decay: case.layer(decay, targets), normal(2, 3))


@pytest.mark.parametrize("part", ["solve", "derivative"])
def test_a_second_thread_is_refused(part: str) -> None:
    """Two threads would move the variables of one module at the same time."""
    entered, leave, case = threading.Event(), threading.Event(), Ridge(0)
    waiting = [part == "solve"]

    def loss(module: nn.Module, batch: Tensor, *, decay: nn.Module, targets: nn.Module) -> Tensor:
        if waiting.pop() if waiting else False:
            entered.set()
            assert leave.wait(20)
        return case.level.loss(module, batch, decay=decay, targets=targets)

    level = mlopt.Level(
        "weights", case.level.module, loss, solver=case.level.solver, data=[case.inputs], estimator=mlopt.Dense()
    )
    decay, targets, gradients = normal(1, 3).requires_grad_(), normal(2, 6), []

    def differentiate() -> None:
        (own,) = mlopt.solution(level, values={"decay": decay, "targets": targets}).variables.values()
        waiting.append(part == "derivative")
        gradients.extend(torch.autograd.grad(own.sum(), decay))

    other = threading.Thread(target=differentiate)
    other.start()
    assert entered.wait(20)
    with pytest.raises(mlopt.EstimatorError, match="another thread"):
        mlopt.solution(level, values={"decay": decay, "targets": targets})
    leave.set()
    other.join()
    expected = torch.autograd.grad(case.solution(decay, targets).sum(), decay)
    assert distance(gradients[0], expected[0]) < 1e-10
    differentiate()
    assert torch.equal(*gradients)


def test_inference_mode_returns_the_solution_without_a_graph() -> None:
    case = Ridge(0)
    decay, targets = normal(1, 3).requires_grad_(), normal(2, 6)
    with torch.inference_mode():
        inside = [case.layer(decay * 1, targets) for _ in range(3)]
    assert all(torch.equal(own, case.solution(decay, targets)) and not own.requires_grad for own in inside)
    (gradient,) = torch.autograd.grad(case.layer(decay, targets).sum(), decay)
    assert distance(gradient, *torch.autograd.grad(case.solution(decay, targets).sum(), decay)) < 1e-10


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch reads it where it leaves a graph
def test_a_compiled_model_holds_a_solution() -> None:
    case, targets = Ridge(0), normal(1, 6)
    compiled = torch.compile(lambda decay: 3 * case.layer(2 * decay, targets), backend="eager")
    decay = normal(2, 3).requires_grad_()
    expected = 3 * case.solution(2 * decay, targets)
    own = compiled(decay)
    assert distance(own.detach(), expected.detach()) < 1e-12
    pairs = zip(*(torch.autograd.grad(x.sum(), decay) for x in (own, expected)), strict=True)
    assert all(distance(a, b) < 1e-10 for a, b in pairs)


def test_wrong_arguments_are_named() -> None:
    case = Ridge(0)
    decay, targets = torch.zeros(3, dtype=torch.float64), normal(1, 6)
    stepped = Ridge(0, optimizer=partial(SGD, lr=0.1)).level
    problem = quadratic("two", mlopt.Dense()).problem
    half = {name: variable.detach().half() for name, variable in problem["x"].module.named_parameters()}
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (case, {}, "problem=.*an mlopt.Problem or an mlopt.Level"),
        (case.level, {}, r"values\['decay'\]=None; it must be a tensor"),
        (
            case.level,
            {"values": {"decay": decay.long(), "targets": targets}},
            r"values\['decay'\].*of a floating dtype",
        ),
        (case.level, {"values": {"decay": decay, "targets": targets, "x": decay}}, r"values\['x'\], but the solution"),
        (stepped, {"values": {"decay": decay, "targets": targets}}, "pass steps"),
        (case.level, {"values": {"decay": decay, "targets": targets}, "steps": 2}, "has a solver"),
        (case.level, {"values": {"decay": decay, "targets": targets}, "seed": 0.5}, "seed=0.5"),
        (problem, {}, "level=None; it must be one of x, y"),
        (problem, {"level": "x"}, "depends on no other level"),
        (
            problem,
            {"level": "y", "values": {"x": decay}},
            "is a Tensor; it must be tensors by parameter name: weight, shift",
        ),
        (problem, {"level": "y", "values": {"x": {"scale": decay}}}, r"values\['x'\] has scale"),
        (problem, {"level": "y", "values": {"x": half}}, r"values\['x'\]: 'weight' is \(2, 2\) of torch.float16, not"),
    ]
    for first, options, message in wrong:
        with pytest.raises(mlopt.ArgumentError, match=message):
            mlopt.solution(first, **options)


def test_the_caches_of_a_level_end_with_it() -> None:
    case = Ridge(0)
    solved = mlopt.solution(case.level, values={"decay": normal(1, 3).requires_grad_(), "targets": normal(2, 6)})
    solved.variables["value"].sum().backward()
    level = weakref.ref(case.level)
    del case, solved
    gc.collect()
    assert level() is None


def test_a_backward_pass_has_the_precision_of_the_call() -> None:
    """As torch's own operations: an autocast region around the backward pass alone changes nothing."""
    inputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))

    def loss(module: nn.Module, batch: Any, *, targets: nn.Module) -> Tensor:
        return (inputs @ module() - targets()).square().sum() + module().square().sum()

    level = mlopt.Level(
        "weights",
        mlopt.variables(torch.zeros(3)),
        loss,
        optimizer=partial(SGD, lr=0.02),
        estimator=mlopt.Dense(products="autograd"),
    )
    gradients = []
    for enabled in (False, True):
        targets = torch.arange(6.0, requires_grad=True)
        solved = mlopt.solution(level, values={"targets": targets}, steps=5).variables["value"]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            solved.sum().backward()
        gradients.append(targets.grad)
    assert torch.equal(*gradients)
