"""Estimates of memory and passes beside the measured peaks and counts of runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_processes
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW

import mlopt
from benchmarks.hypergrad.measuring import peak_memory
from benchmarks.scale import network, reweighting
from mlopt.diagnosis import estimate_requirements
from mlopt.diagnosis.allocations import Allocations
from mlopt.diagnosis.sizes import optimizer_size
from mlopt.testing import quadratic

CG = partial(mlopt.ConjugateGradient, iterations=5, rtol=0.0, damping=3.0)
ESTIMATORS: dict[str, Callable[[], mlopt.Estimator]] = {
    "identity": mlopt.Identity,
    "differences": mlopt.FiniteDifference,
    "sama": mlopt.SAMA,
    "cg": CG,
    "cg by differences": partial(CG, products="finite_difference"),
    "cg, warm": partial(CG, warm_start=True),
    "cg, gauss-newton": partial(CG, products="gauss_newton"),
    "minres": partial(mlopt.MINRES, iterations=5, rtol=0.0, damping=3.0),
    "gmres": partial(mlopt.GMRES, iterations=12, rtol=0.0, damping=0.3),
    "neumann": partial(mlopt.Neumann, iterations=5),
    "nystrom": partial(mlopt.Nystrom, rank=6, damping=0.3),
    "unrolled": partial(mlopt.Unrolled, steps=6),
    "value function": partial(mlopt.ValueFunction, steps=3),
}


def of(estimator: mlopt.Estimator, optimizer: Any, variables: float = 5e4, steps: int = 1) -> mlopt.Problem:
    weights, net = reweighting(network(variables), estimator).levels
    own = {"optimizer": optimizer, "data": net.data, "steps": steps, "estimator": estimator}
    return mlopt.Problem(
        mlopt.Level("weights", weights.module, weights.definition, data=weights.data, optimizer=optimizer),
        mlopt.Level("net", net.module, net.definition, **own),
    )


def measured(problem: mlopt.Problem, steps: int = 2) -> int:
    """Return the peak of a run of some outer steps, modules included."""
    modules = sum(x.numel() * x.element_size() for level in problem for x in level.module.parameters())
    return modules + peak_memory(lambda: mlopt.solve(problem, steps, seed=0, progress=False), "cpu")


@pytest.mark.filterwarnings("ignore::mlopt.TrustWarning")
@pytest.mark.parametrize("optimizer", [SGD, Adam], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_peak_is_that_of_a_run(name: str, optimizer: type) -> None:
    optimizer = partial(optimizer, lr=1e-3)
    estimate = estimate_requirements(of(ESTIMATORS[name](), optimizer))
    assert estimate.unknown == ()
    # With an assumed inverse a pullback frees the gradient of the level, which is 8% to 14% of the peak.
    tolerance = 0.05 if name in ("identity", "differences", "sama") else 0.15
    assert estimate.memory == pytest.approx(measured(of(ESTIMATORS[name](), optimizer)), rel=tolerance)


@pytest.mark.parametrize("variables", [2e4, 5e5])
def test_the_peak_grows_with_the_variables(variables: float) -> None:
    optimizer = partial(SGD, lr=1e-3)
    estimate = estimate_requirements(of(CG(), optimizer, variables))
    assert estimate.memory == pytest.approx(measured(of(CG(), optimizer, variables)), rel=0.15)


@pytest.mark.filterwarnings("ignore::mlopt.TrustWarning")
@pytest.mark.parametrize("pairs", [2, 4])
def test_pairs_of_a_history_count(pairs: int) -> None:
    # Solves do not converge, so the history is full after two steps, and the third forms the next from it.
    optimizer, rule = partial(SGD, lr=1e-3), partial(CG, history=pairs, damping=0.3)
    estimate = estimate_requirements(of(rule(), optimizer, 1e4))
    size = estimate.levels["net"].gradient
    # Two vectors a pair, the solution, its product and the drift.
    assert estimate.levels["net"].kept == (2 * pairs + 3) * size
    assert estimate.memory == pytest.approx(measured(of(rule(), optimizer, 1e4), steps=4), rel=0.15)


@pytest.mark.filterwarnings("ignore::mlopt.TrustWarning")
@pytest.mark.parametrize("name", [*ESTIMATORS, "cg, forward"])
def test_evaluations_and_products_are_those_of_a_run(name: str) -> None:
    kinds = {"cg, forward": partial(CG, products="forward")}
    estimator = (ESTIMATORS | kinds)[name]()
    calls: list[str] = []
    marks: list[int] = []

    def counted(loss: Callable[..., Tensor], level: str) -> Callable[..., Tensor]:
        def own(module: nn.Module, batch: Any, *, net: nn.Module) -> Tensor:
            calls.append(level)
            return loss(module, batch, net=net)

        def inner(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
            calls.append(level)
            return loss(module, batch, weights=weights)

        return own if level == "weights" else inner

    class Mark(mlopt.Callback):
        def on_step_end(self, run: Any) -> None:
            marks.append(len(calls))

    torch.manual_seed(0)
    weights, net = reweighting(nn.Sequential(nn.Linear(64, 3), nn.Tanh(), nn.Linear(3, 10)), estimator).levels
    # In double precision, no solve ends early at rounding.
    for level in (weights, net):
        level.module.double()
    held_out, training = ([(x.double(), y) for x, y in level.data] for level in (weights, net))
    sgd = partial(SGD, lr=1e-3)
    own = {"data": training, "steps": 3, "accumulate": 2, "estimator": estimator}
    problem = mlopt.Problem(
        mlopt.Level("weights", weights.module, counted(weights.definition, "weights"), data=held_out, optimizer=sgd),
        mlopt.Level("net", net.module, counted(net.definition, "net"), optimizer=sgd, **own),
    )
    levels = estimate_requirements(problem).levels
    calls.clear()
    solution = mlopt.solve(problem, 3, seed=0, progress=False, callbacks=[Mark()])
    last = calls[marks[1] : marks[2]]
    assert levels["net"].steps == 3
    assert levels["net"].evaluations == last.count("net")
    assert levels["weights"].evaluations == last.count("weights") == 1
    assert levels["net"].products == solution.reports["net"].products


@pytest.mark.filterwarnings("ignore::mlopt.TrustWarning")
@pytest.mark.parametrize("warm_start", [False, True])
def test_a_solve_that_converges_takes_fewer_products(warm_start: bool) -> None:
    rule = CG(iterations=20, rtol=1e-2, warm_start=warm_start)
    products = estimate_requirements(of(rule, partial(SGD, lr=1e-3), 1e4)).levels["net"].products
    solution = mlopt.solve(of(rule, partial(SGD, lr=1e-3), 1e4), 3, seed=0, progress=False)
    assert products == 20 + warm_start
    assert 0 < solution.reports["net"].products < products


def test_products_of_a_nest_are_an_upper_bound() -> None:
    problem = quadratic("nested", mlopt.ConjugateGradient(iterations=3, rtol=0.0)).problem
    levels = estimate_requirements(problem).levels
    reports = mlopt.hypergradient(problem).reports
    names = list(reports)
    for name in names:
        assert reports[name].products <= (levels[name].products or 0)


@pytest.mark.parametrize(
    ("optimizer", "vectors"),
    [(SGD, 0), (partial(SGD, momentum=0.9), 1), (Adam, 2), (partial(AdamW, amsgrad=True), 3)],
)
def test_the_state_of_an_optimizer_is_that_of_its_first_step(optimizer: Any, vectors: int) -> None:
    module = nn.Linear(30, 20)
    for given in (partial(optimizer, lr=1e-3), optimizer(module.parameters(), lr=1e-3)):
        level = mlopt.Level("x", module, lambda x, batch: x.weight.sum(), optimizer=given)
        state, _ = optimizer_size(level)
        assert state == pytest.approx(vectors * 4 * 620, abs=16)
    assert all(parameter.grad is None and not parameter.is_meta for parameter in module.parameters())


def test_activations_are_those_of_the_rows_of_one_process() -> None:
    def loss(module: nn.Module, batch: Tensor, *, u: nn.Module) -> Tensor:
        return (module() * batch - u()).tanh().square().mean()

    def outer(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
        return x().square().sum() + module().sum()

    sgd = partial(SGD, lr=1e-3)
    problem = mlopt.Problem(
        mlopt.Level("u", mlopt.variables(torch.ones(1)), outer, optimizer=sgd),
        mlopt.Level(
            "x", mlopt.variables(torch.ones(1)), loss, data=[torch.ones(80_000, 1)], optimizer=sgd, estimator=CG()
        ),
    )
    one, eight = (estimate_requirements(problem, processes=n) for n in (1, 8))
    assert eight.levels["x"].pullback == pytest.approx(one.levels["x"].pullback / 8, rel=0.01)
    assert eight.memory == pytest.approx(one.memory / 8, rel=0.01)


def by_rows() -> mlopt.Problem:
    """Return a problem whose batches can be split by rows: each row knows the number of its weight."""
    weights, net = of(CG(), partial(Adam, lr=1e-3)).levels
    ((inputs, labels),) = net.data

    def training(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
        inputs, labels, index = batch
        losses = cross_entropy(module(inputs), labels, reduction="none")
        return (weights()[index].sigmoid() * losses).mean()

    own = {"optimizer": partial(Adam, lr=1e-3), "data": [(inputs, labels, torch.arange(64))], "estimator": CG()}
    return mlopt.Problem(weights, mlopt.Level("net", net.module, training, **own))


def peak_of_this_process() -> int:
    return measured(by_rows())


@pytest.mark.filterwarnings("ignore::mlopt.TrustWarning")
def test_vectors_are_whole_on_every_process(tmp_path: Path) -> None:
    one, two = (estimate_requirements(by_rows(), processes=n) for n in (1, 2))
    assert (two.levels["net"].gradient, two.levels["net"].optimizer) == (
        one.levels["net"].gradient,
        one.levels["net"].optimizer,
    )
    for peak in in_processes(2, peak_of_this_process, folder=tmp_path):
        assert two.memory == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize("options", [{"compile": True}, {"curvature_batches": "all"}])
def test_a_cost_that_depends_on_a_compiler_or_an_epoch_is_not_known(options: Any) -> None:
    data = {"curvature_data": reweighting(network(1e3), CG()).levels[1].data} if "curvature_batches" in options else {}
    estimate = estimate_requirements(of(CG(**options, **data), partial(SGD, lr=1e-3), 1e3))
    assert estimate.unknown == ("net",)
    assert (estimate.levels["net"].pullback, estimate.levels["net"].products) == (None, None)
    assert "not known" in str(estimate)


def test_a_rule_that_does_not_state_its_cost_is_named() -> None:
    class Mine(mlopt.Estimator):
        def linearize(self, point: Any, level: str) -> Any:
            return mlopt.Dense().linearize(point, level)

    estimate = estimate_requirements(quadratic("two", Mine()).problem)
    assert estimate.unknown == ("y",)
    assert estimate.levels["y"].pullback is None
    assert "without pullbacks through y" in str(estimate)


def test_the_table_is_part_of_a_diagnosis() -> None:
    diagnosis = mlopt.diagnose(quadratic("two", CG()).problem, processes=2)
    assert diagnosis.requirements.processes == 2
    assert "for one of 2 processes: memory in MiB" in " ".join(str(diagnosis).split())


def test_a_diagnosis_estimates_when_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def estimate(*arguments: Any, **options: Any) -> Any:
        calls.append(options["processes"])
        return estimate_requirements(*arguments, **options)

    monkeypatch.setattr("mlopt.diagnosis.diagnosis.estimate_requirements", estimate)
    diagnosis = mlopt.diagnose(quadratic("two", CG()).problem, processes=2)
    assert diagnosis.safe
    assert calls == []
    assert diagnosis.requirements is diagnosis.requirements
    assert calls == [2]


@pytest.mark.parametrize("function", [estimate_requirements, mlopt.diagnose])
def test_a_number_of_processes_below_one_is_refused(function: Callable[..., Any]) -> None:
    with pytest.raises(mlopt.ArgumentError, match="processes=0"):
        function(quadratic("two", CG()).problem, processes=0)


def test_allocations_count_what_is_alive_at_a_time() -> None:
    given = torch.zeros(250)
    with Allocations() as allocations:
        first = torch.ones(250)
        given.add_(first)
        second = first.view(25, 10) + 1
        del first
        third = torch.ones(500)
        del second
    assert (allocations.held, allocations.peak) == (2_000, 3_000)
    del third
    assert allocations.held == 0
