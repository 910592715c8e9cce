"""The response by real steps: equal to re-solving by hand, exact on quadratics, and rolled back to the last bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from core_cases import distance, drawn, flat, seeds
from hypothesis import given
from hypothesis import strategies as st
from option_cases import F64, around_means, vector
from states import assert_same_state
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LinearLR, StepLR
from torch.utils.data import DataLoader

import mlopt
from mlopt import Level, Problem, RealSteps
from mlopt.hypergradient import seeded_generators
from mlopt.rng import GeneratorState, seed_everything
from mlopt.testing import same, snapshot

OBJECTIVES = 8


class Net(nn.Module):
    """A network with batch normalisation, dropout, and a buffer that is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, OBJECTIVES + 1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + len(x)
        return self.last(nn.functional.dropout(self.norm(self.first(x)).tanh(), 0.3, self.training))


class Weights(nn.Module):
    """Mixture weights that sum to one."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.linspace(-0.5, 0.5, OBJECTIVES, dtype=F64))

    def forward(self) -> Tensor:
        return self.logits.softmax(0)


def training(net: Any, batch: Any, *, weights: Any) -> Tensor:
    errors = (net(batch[0]) - batch[1]).square().mean(0)
    return weights() @ errors[:OBJECTIVES]


def mixture(net: Any, batch: Any, *, weights: Any) -> mlopt.Mixture:
    errors = (net(batch[0]) - batch[1]).square().mean(0)
    return mlopt.Mixture([errors[k] for k in range(OBJECTIVES)], weights="weights")


def validation(weights: Any, batch: Any, *, net: Any) -> Tensor:
    return (net(batch[0])[:, -1] - batch[1][:, -1] - batch[1][:, 0]).square().mean() + 0.1 * weights().square().sum()


def batches(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    draws = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(6, 3, generator=draws, dtype=F64), torch.randn(6, OBJECTIVES + 1, generator=draws, dtype=F64))
        for _ in range(count)
    ]


def network() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Net().double()


ADAM = partial(Adam, lr=0.02)
DATA, HELD_OUT = batches(4), batches(2, seed=9)


def mixed(response: Any, *, outer: dict[str, Any] | None = None, **options: Any) -> Problem:
    """Return 8 mixture weights for a small network; `options` are those of the network's level."""
    own = {"loss": training, "data": DATA, "optimizer": ADAM} | options
    weights = {"data": HELD_OUT, "optimizer": partial(SGD, lr=2.0)} | (outer or {})
    return Problem(
        Level("weights", Weights(), validation, response=response, **weights),
        Level("net", own.pop("module", None) or network(), **own),
    )


def step(net: Net, optimizer: Any, batch: Any, weights: Weights) -> None:
    optimizer.zero_grad()
    training(net, batch, weights=weights).backward()
    weights.logits.grad = None
    optimizer.step()


def copied(net: Net, optimizer: Any, make: Callable[..., Any] = ADAM) -> tuple[Net, Any]:
    """Return copies of a network and of its optimiser, with its state."""
    twin = copy.deepcopy(net)
    other = make(twin.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return twin, other


def by_hand(
    net: Net, optimizer: Any, weights: Weights, data: Sequence[Any], held_out: Any, start: GeneratorState, size: float
) -> Tensor:
    """Return the differences by a plain loop: a copy of network and optimiser for each displaced point."""
    gradient = torch.zeros(OBJECTIVES, dtype=F64)
    for k in range(OBJECTIVES):
        values = []
        for sign in (1.0, -1.0):
            displaced = copy.deepcopy(weights)
            displaced.logits.data[k] += sign * size
            twin, own = copied(net, optimizer)
            start.restore()
            for batch in data:
                step(twin, own, batch, displaced)
            start.restore()
            values.append(float(validation(displaced, held_out, net=twin).detach()))
        gradient[k] = (values[0] - values[1]) / (2 * size)
    return gradient


@pytest.mark.parametrize("loss", [training, mixture])
def test_mixture_weights_of_a_network_equal_a_loop_by_hand(loss: Any) -> None:
    """The optimiser has momenta from ten steps. Rounding over the displacement bounds the difference."""
    net, weights = network(), Weights()
    optimizer = ADAM(net.parameters())
    for k in range(10):
        step(net, optimizer, DATA[k % 4], weights)
    problem = mixed(RealSteps(steps=7, displacement=1e-3), module=net, optimizer=optimizer, loss=loss)
    start = seeded_generators(problem, "seed", 5)["weights"]
    before = snapshot(problem, [optimizer])
    result = mlopt.hypergradient(problem, seed=5)
    assert same(before, snapshot(problem, [optimizer]))
    with torch.random.fork_rng():
        expected = by_hand(net, optimizer, weights, [DATA[k % 4] for k in range(7)], HELD_OUT[0], start, 1e-3)
        start.restore()
        loss_value = validation(weights, HELD_OUT[0], net=copy.deepcopy(net))
    assert distance(flat(result.gradient), expected) < 1e-10
    assert torch.equal(result.loss, loss_value.detach())
    assert float(expected.norm()) > 1e-3


def test_a_run_equals_a_loop_by_hand() -> None:
    problem = mixed(RealSteps(steps=5, displacement=1e-3), steps=3)
    run = mlopt.solve(problem, 3, seed=0, progress=False)

    net, weights = network(), Weights()
    optimizer, seen = ADAM(net.parameters()), []
    seed_everything(0)
    for outer in range(3):
        for k in range(3 * outer, 3 * outer + 3):
            step(net, optimizer, DATA[k % 4], weights)
        start = GeneratorState.capture()
        held_out = HELD_OUT[outer % 2]
        # The evaluation of the outer objective changes no buffer of the network.
        seen.append(float(validation(weights, held_out, net=copy.deepcopy(net)).detach()))
        after = GeneratorState.capture()
        data = [DATA[k % 4] for k in range(5 * outer, 5 * outer + 5)]
        weights.logits.data -= 2.0 * by_hand(net, optimizer, weights, data, held_out, start, 1e-3)
        after.restore()
    assert distance(problem["weights"].module.logits.detach(), weights.logits.detach()) < 1e-10
    assert distance(flat(dict(problem["net"].module.state_dict())), flat(dict(net.state_dict()))) < 1e-10
    assert run.history.column("weights/loss") == pytest.approx(seen, rel=1e-10)


def shuffled() -> DataLoader[Any]:
    """Return 14 examples, in three batches of 4 and one of 2."""
    return DataLoader([(x[0], y[0]) for x, y in batches(14)], batch_size=4, shuffle=True)  # type: ignore[arg-type]


def restless(response: RealSteps, lr: float = 2.0) -> Problem:
    scheduler = partial(StepLR, step_size=2, gamma=0.9)
    outer = {"optimizer": partial(Adam, lr=lr)}
    return mixed(response, outer=outer, data=shuffled(), steps=2, scheduler=scheduler, clip=1.0)


def state_of_run(problem: Problem, folder: Path, *steps: int, **options: Any) -> Any:
    for k, count in enumerate(steps):
        checkpoint = mlopt.Checkpoints(folder, every=1)
        mlopt.solve(problem, count, seed=0, checkpoint=checkpoint, resume=k > 0, progress=False, **options)
        if k < len(steps) - 1:
            problem = restless(problem.outermost.response)  # type: ignore[arg-type]
    return mlopt.Checkpoints(folder).newest()[2]  # type: ignore[index]


def test_training_does_not_depend_on_the_steps_that_are_rolled_back(tmp_path: Path) -> None:
    """With an outer learning rate of zero, runs that look ahead 1 or 6 steps have bit-equal states and generators."""
    states = []
    for steps in (1, 6):
        state = state_of_run(restless(RealSteps(steps=steps), lr=0.0), tmp_path / str(steps), 3)
        del state["problem"], state["engine"]["response"]
        del state["engine"]["levels"]["weights"]["optimizer"]  # holds moments of the gradient
        states.append(state)
    assert_same_state(*states)


@pytest.mark.parametrize("options", [{}, {"lookahead": True}, {"on_nonfinite": "rollback"}])
def test_a_resumed_run_is_bit_equal(options: dict[str, Any], tmp_path: Path) -> None:
    whole = state_of_run(restless(RealSteps(steps=3)), tmp_path / "whole", 5, **options)
    parts = state_of_run(restless(RealSteps(steps=3)), tmp_path / "parts", 2, 5, **options)
    assert_same_state(whole, parts)


def quadratic(seed: int, variables: int, size: int) -> tuple[Problem, Tensor]:
    """Return F = |C x - d|^2 / 2 + |u|^2 / 2 with x = argmin (x - A u - b)' H (x - A u - b) / 2, and dF/du."""
    draws = torch.Generator().manual_seed(seed)
    a, b, c, d, root = (
        torch.randn(shape, generator=draws, dtype=F64)
        for shape in ((size, variables), (size,), (size, size), (size,), (size, size))
    )
    u = torch.randn(variables, generator=draws, dtype=F64)
    eigenvectors = torch.linalg.qr(root)[0]
    hessian = eigenvectors @ torch.diag(torch.linspace(1.0, 2.0, size, dtype=F64)) @ eigenvectors.T

    def inner(own: Any, batch: Any, *, outer: Any) -> Tensor:
        error = own() - a @ outer().detach() - b  # no derivative by the outer variables
        return error @ hessian @ error / 2

    def outer(own: Any, batch: Any, *, inner: Any) -> Tensor:
        return (c @ inner() - d).square().sum() / 2 + own().square().sum() / 2

    problem = Problem(
        Level("outer", mlopt.variables(u), outer, response=RealSteps(steps=60)),
        Level("inner", mlopt.variables(torch.zeros(size, dtype=F64)), inner, optimizer=partial(SGD, lr=0.6)),
    )
    return problem, a.T @ c.T @ (c @ (a @ u + b) - d) + u


@given(seeds, st.integers(1, 4), st.integers(1, 5))
@drawn(15)
def test_it_is_exact_on_quadratics(seed: int, variables: int, size: int) -> None:
    """Central differences of a quadratic are exact, up to rounding; 60 steps contract by 0.4^60."""
    problem, expected = quadratic(seed, variables, size)
    result = mlopt.hypergradient(problem)
    error = float((flat(result.gradient) - expected).norm())
    assert error < 1e-8 * max(1.0, float(expected.norm()))
    report = result.reports["outer"]
    assert (report.solves, report.iterations, report.converged) == (2 * variables, 120 * variables, None)
    assert report.step == pytest.approx(1.2e-4, rel=0.02)


def test_the_estimators_of_inner_levels_are_checked_against_the_same_oracles() -> None:
    problem, _ = quadratic(0, 3, 4)
    check = mlopt.check_hypergradient(problem, oracle="resolve", tolerance=1e-6)
    assert check.error < 1e-6
    few = Problem(changed(problem.outermost, response=RealSteps(steps=1)), problem["inner"])
    with pytest.raises(mlopt.DisagreementError, match="'outer' has 1 real step, central differences, which is not"):
        mlopt.check_hypergradient(few, oracle="resolve")
    assert "no level is pulled back" in str(mlopt.diagnose(problem))


def changed(level: Level, **changes: Any) -> Level:
    options = {"data": level.data, "optimizer": level.optimizer, "steps": level.steps, "response": level.response}
    return Level(level.name, level.module, level.loss, **(options | changes))


def test_forward_differences_need_one_run_more_than_variables() -> None:
    problem, expected = quadratic(0, 3, 4)
    forward = Problem(changed(problem.outermost, response=RealSteps(steps=60, differences="forward")), problem["inner"])
    assert forward.outermost.response.cost(forward) == {"inner": 4 * 60}  # type: ignore[union-attr]
    result = mlopt.hypergradient(forward)
    assert 1e-8 < distance(flat(result.gradient), expected) < 1e-2
    assert result.reports["outer"].solves == 4


def chain(response: Any, solver_calls: list[int], steps: list[int]) -> Problem:
    """Return weights -> pretraining -> a head in closed form, which is exact: the head is the pretrained variable."""

    def outer(own: Any, batch: Any, *, head: Any) -> Tensor:
        return (head() - 1).square().sum()

    def head(own: Any, batch: Any, *, body: Any) -> Tensor:
        return (own() - body()).square().sum()

    def solver(own: Any, batch: Any, *, body: Any) -> None:
        solver_calls.append(1)
        own.value.data.copy_(body().detach())

    def body(own: Any, batch: Any, *, weights: Any) -> Tensor:
        steps.append(1)
        return (own() - weights()).square().sum() / 2

    return Problem(
        Level("weights", vector(0.5, -0.5), outer, optimizer=partial(SGD, lr=0.1), response=response),
        Level("head", vector(3.0, 3.0), head, solver=solver),
        Level("body", vector(0.0, 0.0), body, optimizer=partial(SGD, lr=0.5), steps=4),
    )


@pytest.mark.parametrize("count", [None, 30])
def test_a_chain_is_stepped_in_order_at_the_stated_cost(count: int | None) -> None:
    """After n steps from zero the body is at (1 - 0.5^n) u, so that dF/du = 2 s (s u - 1)."""
    calls: list[int] = []
    steps: list[int] = []
    problem = chain(RealSteps(steps=count), calls, steps)
    cost = problem.outermost.response.cost(problem)  # type: ignore[union-attr]
    n = count or 4
    assert cost == {"body": 4 * n, "head": 4}
    assert f"{4 * n + 4} steps inside for each hypergradient" in str(problem)
    calls.clear()
    steps.clear()
    result = mlopt.hypergradient(problem)
    # The loss at the present point solves the head once more.
    assert (len(steps), len(calls)) == (4 * n, 4 + 1)
    s = 1 - 0.5**n
    expected = 2 * s * (s * torch.tensor([0.5, -0.5], dtype=F64) - 1)
    assert distance(flat(result.gradient), expected) < 1e-8
    assert float(result.loss) == 2.0
    mlopt.solve(chain(RealSteps(steps=count), calls, steps), 2, progress=False)


def test_a_given_batch_serves_every_step() -> None:
    problem = mixed(RealSteps(steps=3))
    repeated = mixed(RealSteps(steps=3), data=[DATA[2]])
    given_one = mlopt.hypergradient(problem, {"net": DATA[2]}, seed=0)
    assert torch.equal(flat(given_one.gradient), flat(mlopt.hypergradient(repeated, seed=0).gradient))
    assert not torch.equal(
        flat(given_one.gradient), flat(mlopt.hypergradient(mixed(RealSteps(steps=3)), seed=0).gradient)
    )


def test_nothing_moves_when_a_step_fails() -> None:
    calls = 0

    def fatal(net: Any, batch: Any, *, weights: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise FloatingPointError
        return training(net, batch, weights=weights)

    net = network()
    optimizer = ADAM(net.parameters())
    step(net, optimizer, DATA[0], Weights())
    problem = mixed(RealSteps(steps=3), module=net, optimizer=optimizer, loss=fatal)
    before = snapshot(problem, [optimizer])
    with pytest.raises(FloatingPointError):
        mlopt.hypergradient(problem)
    assert same(before, snapshot(problem, [optimizer]))


def test_a_buffer_that_the_steps_bind_is_unbound() -> None:
    problem = around_means([[1.0, 2.0], [5.0, -1.0]], response=RealSteps(steps=2))
    mlopt.hypergradient(problem)
    assert problem["net"].module.mean is None


def test_an_optimizer_instance_keeps_the_learning_rate_that_its_scheduler_would_change() -> None:
    """A warm-up scheduler changes the learning rate when it is made."""
    net = network()
    optimizer = ADAM(net.parameters())
    step(net, optimizer, DATA[0], Weights())
    problem = mixed(RealSteps(steps=2), module=net, optimizer=optimizer, scheduler=partial(LinearLR, start_factor=0.1))
    before = copy.deepcopy(optimizer.state_dict())
    mlopt.hypergradient(problem)
    assert_same_state(optimizer.state_dict(), before)


def fragile(limits: tuple[float, float]) -> Problem:
    """Return a problem whose inner loss is NaN where the outer variable k is above limit k."""

    def outer(own: Any, batch: Any, *, inner: Any) -> Tensor:
        return inner().sum()

    def inner(own: Any, batch: Any, *, outer: Any) -> Tensor:
        broken = bool((outer() > torch.tensor(limits, dtype=F64)).any())
        return (own() - outer()).square().sum() / 2 + (torch.nan if broken else 0.0)

    return Problem(
        Level("outer", vector(1.0, 1.0), outer, optimizer=partial(SGD, lr=0.1), response=RealSteps(steps=1)),
        Level("inner", vector(0.0, 0.0), inner, optimizer=partial(SGD, lr=1.0)),
    )


def test_a_side_that_is_not_finite_is_doubtful() -> None:
    problem = fragile((2.0, 1.0))
    before = snapshot(problem)
    with pytest.warns(mlopt.TrustWarning, match=r"not finite on a side of value\[1\]"):
        result = mlopt.hypergradient(problem)
    assert same(before, snapshot(problem))
    assert distance(result.gradient["value"], torch.tensor([1.0, 0.0], dtype=F64)) < 1e-10
    assert result.reports["outer"].doubtful
    with pytest.warns(mlopt.TrustWarning) as warned:
        mlopt.solve(problem, 2, progress=False)
    first, summary = (str(warning.message) for warning in warned)
    assert first.startswith("level 'outer': the objective after the steps is not finite on a side of value[1]")
    assert summary.startswith("level 'outer', doubtful in 2 steps")


def test_no_finite_derivative_raises() -> None:
    problem = fragile((1.0, 1.0))
    before = snapshot(problem)
    with pytest.raises(mlopt.NonFiniteError, match="along every variable"):
        mlopt.hypergradient(problem)
    assert same(before, snapshot(problem))
    with pytest.raises(
        mlopt.NonFiniteError, match=r"outer step 1: .*\(estimators: outer: 1 real step, central differences\)"
    ):
        mlopt.solve(problem, 1, progress=False)


def test_an_objective_without_a_derivative() -> None:
    """The outer objective is a number that autograd cannot see."""

    def outer(own: Any, batch: Any, *, inner: Any) -> Tensor:
        return torch.tensor(float(inner().detach().square().sum()), dtype=F64)

    def inner(own: Any, batch: Any, *, outer: Any) -> Tensor:
        return (own() - outer()).square().sum() / 2

    problem = Problem(
        Level("outer", vector(1.0, 2.0), outer, optimizer=partial(SGD, lr=0.25), response=RealSteps()),
        Level("inner", vector(0.0, 0.0), inner, optimizer=partial(SGD, lr=1.0)),
    )
    mlopt.solve(problem, 1, progress=False)
    assert distance(problem["outer"].module.value.detach(), torch.tensor([0.5, 1.0], dtype=F64)) < 1e-8


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(mlopt.EstimatorError, match="it has 8 variables, and 3 real steps"):
        mlopt.hypergradient(mixed(RealSteps(steps=3, limit=7)))
    for option, value in {"accumulate": 2, "precision": "bf16"}.items():
        with pytest.raises(mlopt.ProblemError, match=f"{option}={value!r} cannot be combined with response"):
            mixed(RealSteps(steps=3), outer={option: value})
    with pytest.raises(mlopt.ProblemError, match=r"response=3 is a int; give one"):
        mixed(3)
    problem, _ = quadratic(0, 1, 1)
    with pytest.raises(mlopt.ProblemError, match="the outermost level is 'outer'"):
        Problem(problem.outermost, changed(problem["inner"], response=RealSteps()))
    with pytest.raises(mlopt.ProblemError, match="it has no level inside"):
        Problem(Level("x", vector(1.0), lambda x, batch: x().sum(), response=RealSteps()))
    with pytest.raises(mlopt.ProblemError, match="estimator=None"):
        mixed(None)
    for options in ({"steps": 0}, {"displacement": 0.0}, {"differences": "both"}, {"limit": 0}):
        with pytest.raises(mlopt.ArgumentError, match="RealSteps: "):
            RealSteps(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("differences", ["central", "forward"])
def test_outer_variables_of_every_size(differences: str, size: float, dtype: torch.dtype) -> None:
    """One step of 1/2 on |y - exp(u / size)|^2 ends at y = exp(u / size), whose derivative is exp(u / size) / size."""

    def inner(module: nn.Module, batch: Any, *, u: nn.Module) -> Tensor:
        return (module() - (u() / size).exp()).square().sum()

    start = torch.tensor([0.5, 1.0], dtype=dtype)
    problem = Problem(
        Level(
            "u",
            mlopt.variables(size * start),
            lambda module, batch, *, y: y().sum(),
            response=RealSteps(steps=1, differences=differences),
        ),
        Level("y", mlopt.variables(torch.zeros(2, dtype=dtype)), inner, optimizer=partial(SGD, lr=0.5)),
    )
    gradient = flat(mlopt.hypergradient(problem).gradient)
    coarse = 0.05 if dtype == torch.float32 else 1e-3
    assert distance(gradient, start.exp() / size) < coarse
    assert torch.equal(gradient, flat(mlopt.hypergradient(problem).gradient))
