"""Diagnosis: it finds each trap that is put into a problem, and none in a healthy problem."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from core_cases import contents
from functions import OnceDifferentiable
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mlopt
from mlopt import cli
from mlopt.diagnosis import Finding, LevelDiagnosis
from mlopt.diagnosis.solver_rules import iterations_for, neumann_iterations_for, rate_solver
from mlopt.diagnosis.spectrum import Spectrum, lanczos
from mlopt.testing import logistic_regression, quadratic, same, snapshot, stateful_problem, train_a_little

CG = mlopt.ConjugateGradient(iterations=30)


def start(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def build(
    inner: Callable[..., Tensor],
    y: Tensor | nn.Module,
    estimator: mlopt.Estimator = CG,
    outer: Callable[..., Tensor] | None = None,
    dtype: torch.dtype = torch.float64,
) -> mlopt.Problem:
    """Return a problem with a level `x` of four variables outside, and `y` inside."""

    def plain(module: nn.Module, batch: None, *, y: nn.Module) -> Tensor:
        return torch.stack([p.square().sum() for p in y.parameters() if p.requires_grad]).sum() + module().sum()

    return mlopt.Problem(
        mlopt.Level("x", mlopt.variables(torch.ones(4, dtype=dtype)), outer or plain),
        mlopt.Level("y", mlopt.variables(y) if isinstance(y, Tensor) else y, inner, estimator=estimator),
    )


def network(*layers: nn.Module) -> nn.Module:
    """Return layers with fixed weights."""
    module = nn.Sequential(*layers).double()
    for k, parameter in enumerate(module.parameters()):
        parameter.data = start(*parameter.shape) / 3 + k / 10
    return module


def fit(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
    """A weighted regression with a ridge, for any module that takes four features."""
    inputs = start(4, 4)
    losses = (module(inputs).reshape(4, -1) - 1).square().mean(1)
    ridge = torch.stack([p.square().sum() for p in module.parameters()]).sum()
    return (x().sigmoid() * losses).mean() + 2 * ridge


def level(problem: mlopt.Problem, **arguments: Any) -> LevelDiagnosis:
    return mlopt.diagnose(problem, **arguments).levels["y"]


def reported(diagnosis: LevelDiagnosis, severity: str, phrase: str) -> bool:
    """Return True if a finding has the severity and the phrase."""
    return any(f.severity == severity and re.search(phrase, str(f)) for f in diagnosis.findings)


def bowl(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
    return (torch.arange(1.0, 5.0) * (module() - x()).square()).sum() / 2


def test_every_finding_on_a_healthy_problem_is_ok() -> None:
    diagnosis = mlopt.diagnose(build(bowl, torch.ones(4, dtype=torch.float64)))
    result = diagnosis.levels["y"]
    assert diagnosis.safe
    assert {f.severity for f in result.findings} == {"ok"}
    assert {kind: f.severity for kind, f in result.products.items()} == dict.fromkeys(result.products, "ok")
    assert (result.spectrum.low, result.spectrum.high) == (pytest.approx(1.0), pytest.approx(4.0))
    assert result.solvers["ConjugateGradient"].severity == result.solvers["Dense"].severity == "ok"
    assert result.solvers["Identity"].severity == "warning"
    assert "a step size below 0.5" in result.solvers["Neumann"].sentence
    assert reported(result, "ok", "stationary: gradient of norm 0.0e")
    assert max(max(pair) for pair in result.differences.values()) < 1e-7
    assert set(result.costs) == {"autograd", "forward", "finite_difference"}
    assert "safe to run" in str(diagnosis)


def test_logistic_regression_is_stationary_only_near_its_solution() -> None:
    case = logistic_regression(CG)
    assert mlopt.diagnose(case.problem).safe
    value = case.problem["regression"].module.value
    away = 0.01 * value.detach()
    for factor in (1.0, 10.0):
        value.data.copy_((1 + 0.01 * factor) * away / 0.01)
        result = mlopt.diagnose(case.problem).levels["regression"]
        stationary = next(f for f in result.findings if "stationary" in f.sentence)
        assert stationary.severity == ("warning" if factor > 1 else stationary.severity)
        # Newton's step is the distance to the solution if the objective is quadratic.
        measured = float(re.search(r"about ([\d.e+-]+) of", stationary.sentence)[1])
        assert measured == pytest.approx(0.01 * factor, rel=0.1)


def saddle(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
    return (torch.tensor([2.0, 1.0, 1.0, -0.5]) * (module() - x()).square()).sum() / 2


@pytest.mark.parametrize(
    ("estimator", "safe"),
    [
        (CG, False),
        (mlopt.Neumann(), False),
        (mlopt.Neumann(damping=0.7), True),
        (mlopt.ConjugateGradient(damping=0.7), True),
        (mlopt.Dense(), True),
        (mlopt.Identity(), True),
    ],
    ids=str,
)
def test_negative_curvature(estimator: mlopt.Estimator, safe: bool) -> None:
    diagnosis = mlopt.diagnose(build(saddle, torch.ones(4, dtype=torch.float64), estimator))
    result = diagnosis.levels["y"]
    assert diagnosis.safe is safe
    assert reported(result, "warning", r"curvature from at most -0\.5 to at least 2.*conjugate gradients .* unsafe")
    assert result.solvers["ConjugateGradient"].severity == result.solvers["Neumann"].severity == "error"
    assert result.spectrum.low == pytest.approx(-0.5)


def test_a_step_size_above_the_bound() -> None:
    for step_size, safe in ((0.49, True), (0.51, False)):
        estimator = mlopt.Neumann(iterations=100, step_size=step_size)
        assert mlopt.diagnose(build(bowl, torch.ones(4, dtype=torch.float64), estimator)).safe is safe


def test_the_warning_about_too_few_iterations_names_the_number_needed() -> None:
    def stiff(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
        return (torch.logspace(0, 4, 40, dtype=torch.float64) * (module() - x().sum()).square()).sum() / 2

    problem = build(stiff, 4 * torch.ones(40, dtype=torch.float64), mlopt.ConjugateGradient(iterations=5))
    assert reported(level(problem), "warning", "1% needs about 40 iterations")
    assert mlopt.diagnose(problem).safe


def test_fused_attention() -> None:
    def attend(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
        q = module(start(1, 1, 5, 4))
        out = nn.functional.scaled_dot_product_attention(q, q, q)
        return (out.sum(dim=(0, 1, 2)) * x()).sum() + sum(p.square().sum() for p in module.parameters()) * 20

    result = level(build(attend, network(nn.Linear(4, 4))))
    assert reported(result, "warning", r"fused attention \(_scaled_dot_product_flash_attention_for_cpu\)")
    assert {f.severity for f in result.products.values()} == {"ok"}


def test_activation_checkpointing() -> None:
    def recomputed(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
        hidden = checkpoint(lambda z: torch.tanh(module[0](z)), start(4, 4), use_reentrant=False)
        return (x() * module[1](hidden).squeeze(1)).sum() + 5 * sum(p.square().sum() for p in module.parameters())

    result = level(build(recomputed, network(nn.Linear(4, 3), nn.Linear(3, 1))))
    assert reported(result, "warning", "activation checkpointing, which forward products refuse")
    assert result.products["forward"].severity == "error"
    assert result.products["autograd"].severity == result.products["finite_difference"].severity == "ok"
    used = level(build(recomputed, network(nn.Linear(4, 3), nn.Linear(3, 1)), mlopt.Identity(products="forward")))
    assert reported(used, "error", "its estimator, forward products: unsafe")


@pytest.mark.parametrize(
    ("loss", "sentence"),
    [
        (lambda y: OnceDifferentiable.apply(y).square().sum(), "has no second derivative.*finite_difference"),
        (
            lambda y: OnceDifferentiable.apply(y).sum() + 0.1 * y.square().sum(),
            "has no second derivative.*finite_difference",
        ),
        # torch does not raise here: it silently omits a part of the second derivative.
        (lambda y: (y.detach() * y).sum() + y.square().sum(), "differ from differences of its gradient"),
    ],
)
def test_a_second_derivative_that_is_missing(loss: Callable[[Tensor], Tensor], sentence: str) -> None:
    def inner(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
        return loss(module()) - (module() * x()).sum()

    for products, safe in (("autograd", False), ("finite_difference", True)):
        estimator = mlopt.ConjugateGradient(iterations=30, rtol=1e-6, products=products)
        diagnosis = mlopt.diagnose(build(inner, torch.ones(4, dtype=torch.float64), estimator))
        assert diagnosis.safe is safe
        assert re.search(sentence, str(diagnosis.levels["y"].products["autograd"]))
        assert diagnosis.levels["y"].products["finite_difference"].severity == "ok"


def test_batchnorm_and_dropout() -> None:
    module = network(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))
    result = level(build(fit, module))
    assert reported(result, "warning", "BatchNorm in train mode")
    assert reported(result, "warning", "draws random numbers")
    module.eval()
    result = level(build(fit, module))
    assert not any("BatchNorm" in f.sentence or "draws" in f.sentence for f in result.findings)


def test_a_loss_with_a_generator_of_its_own() -> None:
    own = torch.Generator().manual_seed(0)

    def noisy(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
        weights = 1 + torch.rand(4, generator=own, dtype=torch.float64)
        return (weights * (module() - x()).square()).sum()

    result = level(build(noisy, start(4), mlopt.FiniteDifference()))
    assert reported(result, "error", "two evaluations at the same random numbers differ")
    assert reported(result, "error", "its estimator, finite_difference products: unsafe")


def test_the_warning_about_half_precision_names_the_error_of_differences() -> None:
    def curved(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
        return (torch.arange(1, 5) * (module() - x()).cosh()).sum().to(torch.bfloat16)

    result = level(build(curved, start(4, dtype=torch.bfloat16), dtype=torch.bfloat16))
    assert reported(result, "warning", r"variables of torch\.bfloat16\. Finite differences are off by \d+% here")
    assert max(result.differences["finite_difference"]) > 1e-3


def test_kinks_spoil_products_with_the_hessian_first() -> None:
    """Differences across a ReLU spoil the product with the Hessian, but not the mixed one, which is all that Identity needs."""
    module = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 1))
    for k, parameter in enumerate(module.parameters()):
        parameter.data = start(*parameter.shape, dtype=torch.float32) / 3 + k / 10
    inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float32)

    def inner(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
        losses = (module(inputs).squeeze(1) - 1).square().reshape(4, 16).mean(1)
        return (x().sigmoid() * losses).mean() + 1e-3 * sum(p.square().sum() for p in module.parameters())

    def outer(module: nn.Module, batch: None, *, y: nn.Module) -> Tensor:
        return (y(inputs[:8].flip(1)) + 1).square().mean() + module().sum()

    for estimator, safe in ((mlopt.FiniteDifference(), True), (mlopt.Dense(products="finite_difference"), False)):
        diagnosis = mlopt.diagnose(build(inner, module, estimator, outer, dtype=torch.float32))
        own, mixed = diagnosis.levels["y"].differences["finite_difference"]
        assert mixed < 0.1 < own
        assert diagnosis.safe is safe
        assert "or Identity()" in diagnosis.levels["y"].products["finite_difference"].remedy


def test_a_hessian_that_is_not_symmetric() -> None:
    class Skewed(torch.autograd.Function):
        """y^T y / 2, with a backward that is not the derivative of a function."""

        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            ctx.save_for_backward(y)
            return y.square().sum() / 2

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            (y,) = ctx.saved_tensors
            return gradient * (y + 0.3 * torch.roll(y, 1))

    def inner(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
        return Skewed.apply(module()) - (module() * x()).sum()

    result = level(build(inner, start(4)))
    assert reported(result, "error", "the Hessian is not symmetric")
    assert {f.severity for f in result.products.values()} == {"error"}
    assert "not the derivative of a function" in result.products["finite_difference"].sentence


def test_unused_and_frozen_parameters_are_listed() -> None:
    module = network(nn.Linear(4, 3), nn.Linear(3, 1))
    module.extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
    module[1].bias.requires_grad_(False)

    def inner(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
        ridge = sum(p.square().sum() for n, p in module.named_parameters() if n != "extra")
        return (x() * module[1](module[0](start(4, 4))).squeeze(1)).sum() + 5 * ridge

    result = level(build(inner, module))
    assert reported(result, "warning", "does not depend on extra: no curvature there; freeze them")
    assert reported(result, "ok", r"frozen, so not variables: 1\.bias")
    assert reported(result, "warning", "flat directions")


def test_a_level_without_influence_and_a_solution_that_does_not_move() -> None:
    def ignores(module: nn.Module, batch: None, *, y: nn.Module) -> Tensor:
        return module().sum() + 0 * y().sum()

    result = level(build(bowl, torch.ones(4, dtype=torch.float64), outer=ignores))
    assert reported(result, "warning", "no cotangent reaches it")

    def deaf(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
        return module().square().sum() + x().sum()

    assert reported(
        level(build(deaf, torch.ones(4, dtype=torch.float64))), "warning", "its solution does not move with x"
    )


def test_every_level_that_is_pulled_back_is_diagnosed_also_nested_ones() -> None:
    diagnosis = mlopt.diagnose(quadratic("nested_with_two_inside", CG).problem)
    assert set(diagnosis.levels) == {"y", "left", "right"}
    assert diagnosis.safe
    for result in diagnosis.levels.values():
        assert 0.5 < result.spectrum.low < result.spectrum.high < 6
        assert max(result.differences["finite_difference"]) < 1e-3


def test_an_estimator_that_is_not_implicit_is_left_to_the_check() -> None:
    class Mine(mlopt.Estimator):
        def linearize(self, point: Any, level: str) -> Any:
            return mlopt.Dense().linearize(point, level)

    result = level(build(bowl, torch.ones(4, dtype=torch.float64), Mine()))
    assert reported(result, "ok", "is not implicit: its accuracy is not measured here; use check_hypergradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nothing_moves(dtype: torch.dtype) -> None:
    problem = stateful_problem(mlopt.ConjugateGradient(), dtype=dtype)
    optimizers = train_a_little(problem)
    before, workspace = snapshot(problem, optimizers), contents(problem.workspace)
    mlopt.diagnose(problem)
    assert same(before, snapshot(problem, optimizers))
    assert same(contents(problem.workspace), workspace)


@pytest.mark.parametrize("fatal", [1, 2, 3, 4, 5])
def test_nothing_moves_when_a_loss_raises(fatal: int) -> None:
    problem = stateful_problem(mlopt.FiniteDifference(), fatal=fatal)
    before = snapshot(problem)
    with pytest.raises(FloatingPointError):
        mlopt.diagnose(problem)
    assert same(before, snapshot(problem))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), size=st.integers(1, 20))
def test_lanczos_is_exact_on_small_matrices(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    matrix = matrix + matrix.T
    vector = torch.randn(size, generator=generator, dtype=torch.float64)
    values, norm = lanczos(lambda v: matrix @ v, vector, steps=size)
    assert torch.allclose(values, torch.linalg.eigvalsh(matrix), rtol=1e-6, atol=1e-6)
    assert norm == pytest.approx(float(torch.linalg.solve(matrix, vector).norm()), rel=1e-4)


def test_the_counts_follow_from_the_bounds() -> None:
    """The bounds are those for the worst case: of a truncated series, and of Chebyshev."""
    for kappa in (2.0, 10.0, 1000.0):
        k = iterations_for(kappa)
        rate = (kappa**0.5 - 1) / (kappa**0.5 + 1)
        assert 2 * rate**k <= 0.0101
        assert (
            (1 - 1 / kappa) ** (neumann_iterations_for(kappa) + 1)
            <= 0.01
            < (1 - 1 / kappa) ** neumann_iterations_for(kappa)
        )
    assert rate_solver(_unknown(), Spectrum(low=1.0, high=2.0, rounding=0.0, size=3)) is None


def _unknown() -> Any:
    return type("Unheard", (), {"damping": 0.0})()


def test_a_finding_reads_as_a_sentence() -> None:
    assert str(Finding("ok", "all is well")) == "all is well"
    assert str(Finding("error", "it is not", "do this")) == "it is not; do this"


EXPERIMENT = """
import mlopt
from mlopt.testing import logistic_regression
healthy = logistic_regression(mlopt.ConjugateGradient(iterations=3)).problem
def sick():
    return logistic_regression(mlopt.Neumann(iterations=10, step_size=100.0)).problem
number = 3
class inside:
    problem = healthy
"""


@pytest.mark.parametrize(
    ("place", "status", "phrase"),
    [
        ("experiment_of_mine:healthy", 0, "safe to run"),
        ("experiment_of_mine:inside.problem", 0, "safe to run"),
        ("experiment_of_mine:sick", 1, "the series diverges"),
        ("experiment_of_mine:number", 2, "is a int; it must be a mlopt.Problem"),
        ("experiment_of_mine:nothing", 2, "has no attribute 'nothing'"),
        ("experiment_of_yours:healthy", 2, "there is no module 'experiment_of_yours'"),
        ("experiment_of_mine.part:healthy", 2, "there is no module 'experiment_of_mine.part'"),
        ("xml.part:healthy", 2, "there is no module 'xml.part'"),
        ("experiment_of_mine", 2, "give MODULE:ATTRIBUTE"),
        (".experiment_of_mine:healthy", 2, "give MODULE:ATTRIBUTE"),
    ],
)
def test_the_command(
    place: str,
    status: int,
    phrase: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "experiment_of_mine.py").write_text(EXPERIMENT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.main(["diagnose", place]) == status
    captured = capsys.readouterr()
    assert phrase in " ".join(re.sub("[│┌┐└┘─├┤]", " ", captured.out + captured.err).split())
