"""check_hypergradient: it passes a right estimator, rejects a wrong one, and names the cause: the estimator or the point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from core_cases import contents
from functions import OnceDifferentiable
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mlopt
from mlopt.diagnosis.minimize import minimize
from mlopt.problem import Block, Linearization, Point, Vectors
from mlopt.tensors import scale
from mlopt.testing import SHAPES, logistic_regression, quadratic, same, snapshot, stateful_problem, train_a_little

seeds = st.integers(0, 10_000)
FLAT = [name for name in SHAPES if not name.startswith("nested") and "four" not in name and "ladder" not in name]


def drawn(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None)


class Flipped(mlopt.Estimator):
    """Dense with the wrong sign; not an `Implicit`."""

    def linearize(self, point: Point, level: str) -> Linearization:
        rule = mlopt.Dense().linearize(point, level)
        pullback = rule.pullback

        def flipped(cotangent: Vectors, wanted: Sequence[str] | None = None) -> dict[Block, Any]:
            return {block: scale(-1.0, vectors) for block, vectors in pullback(cotangent, wanted).items()}

        rule.pullback = flipped  # type: ignore[method-assign]
        return rule

    def __str__(self) -> str:
        return "Flipped()"


@pytest.mark.parametrize("shape", FLAT)
@drawn(3)
@given(seed=seeds)
def test_solving_again_agrees_with_the_exact_hypergradient(shape: str, seed: int) -> None:
    """Other tests compare Dense with the closed form; this one tests the oracle."""
    case = quadratic(shape, mlopt.Dense(), seed=seed, size=1)
    assert case.error(mlopt.hypergradient(case.problem).gradient) < 1e-10
    check = mlopt.check_hypergradient(case.problem, oracle="resolve", tolerance=1e-6, seed=seed)
    assert check.error < 1e-7
    assert check.accuracy < 1e-6
    assert max(check.moved.values()) < 1e-8


@pytest.mark.parametrize("shape", ["nested", "nested_and_referred_to", "nested_and_looked_into"])
@pytest.mark.parametrize("seed", [1, 2])
def test_solving_again_agrees_when_nested(shape: str, seed: int) -> None:
    case = quadratic(shape, mlopt.Dense(), seed=seed, size=1)
    check = mlopt.check_hypergradient(case.problem, oracle="resolve", tolerance=1e-5, directions=2)
    assert check.error < 1e-5
    assert set(check.gradient_norms) == set(SHAPES[shape]) - {"x"}


@drawn(5)
@given(seed=seeds)
def test_the_total_gradient_of_a_middle_level(seed: int) -> None:
    case = quadratic("nested", mlopt.Dense(), seed=seed, size=1, level="y")
    check = mlopt.check_hypergradient(case.problem, level="y", oracle="resolve", tolerance=1e-6)
    assert check.level == "y"
    assert check.error < 1e-6
    assert set(check.gradient_norms) == {"z"}


@drawn(5)
@given(seed=seeds)
def test_logistic_regression(seed: int) -> None:
    case = logistic_regression(mlopt.ConjugateGradient(iterations=10), seed=seed)
    for oracle in ("dense", "resolve"):
        assert mlopt.check_hypergradient(case.problem, oracle=oracle, tolerance=1e-5).error < 1e-6


@drawn(5)
@given(seed=seeds)
def test_the_error_is_that_from_the_closed_form(seed: int) -> None:
    case = quadratic("chain_of_three", mlopt.Identity(), seed=seed, condition=10.0)
    error = case.error(mlopt.hypergradient(case.problem).gradient)
    with pytest.raises(mlopt.DisagreementError) as caught:
        mlopt.check_hypergradient(case.problem, tolerance=error / 2)
    assert caught.value.check.error == pytest.approx(error, rel=1e-8)
    assert str(caught.value.check) in str(caught.value)
    assert mlopt.check_hypergradient(case.problem, tolerance=1e9).error == pytest.approx(error, rel=1e-8)


def test_a_solve_that_did_not_converge_is_named() -> None:
    case = quadratic("two", mlopt.ConjugateGradient(iterations=1), condition=50.0)
    with pytest.raises(mlopt.DisagreementError, match="The linear solve of 'y' did not converge"):
        mlopt.check_hypergradient(case.problem)


@pytest.mark.parametrize("oracle", ["dense", "resolve"])
def test_an_estimator_that_is_not_implicit_is_compared_too(oracle: str) -> None:
    with pytest.raises(mlopt.DisagreementError, match=r"'y' has Flipped\(\), which is not implicit") as caught:
        mlopt.check_hypergradient(quadratic("two", Flipped()).problem, oracle=oracle)
    # Steps of such an estimator may end at the solution, although the present point is none.
    assert ("which the oracle takes for the solution" in str(caught.value)) == (oracle == "dense")


def test_the_point_is_named_as_the_cause_off_the_solution() -> None:
    case = logistic_regression(mlopt.Dense())
    case.problem["regression"].module.value.data.add_(0.3)
    assert mlopt.check_hypergradient(case.problem, oracle="dense").error < 1e-12
    with pytest.raises(mlopt.DisagreementError, match="the point is the cause, not the estimator") as caught:
        mlopt.check_hypergradient(case.problem, oracle="resolve")
    check = caught.value.check
    assert check.error > 1e-2
    assert check.error_at_solution < 1e-7
    assert check.gradient_norms["regression"] > 1e-2
    # The variables are 0.3 from the solution in every component.
    value = case.problem["regression"].module.value.detach()
    assert check.moved["regression"] == pytest.approx(0.3 * len(value) ** 0.5 / float(value.norm()), rel=1e-6)
    with pytest.raises(mlopt.DisagreementError) as caught:
        mlopt.check_hypergradient(quadratic("two", mlopt.Identity(), condition=10.0).problem, oracle="resolve")
    assert "the point is the cause" not in str(caught.value)


def left_by_a_solver(scale: float, estimator: mlopt.Estimator) -> mlopt.Problem:
    """Return x* = 2 u with a solver that leaves x at `scale` u, below the sum of cubes of x."""

    def outer(u: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
        return x().pow(3).sum()

    def inner(x: nn.Module, batch: None, *, u: nn.Module) -> Tensor:
        return (x() - 2 * u()).square().sum() / 2

    def solver(x: nn.Module, batch: None, *, u: nn.Module) -> None:
        x.value.data.copy_(scale * u().detach())

    u, x = (mlopt.variables(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    return mlopt.Problem(mlopt.Level("u", u, outer), mlopt.Level("x", x, inner, solver=solver, estimator=estimator))


def test_a_solver_that_misses_the_solution_is_named_as_the_cause() -> None:
    with (
        pytest.warns(mlopt.TrustWarning),
        pytest.raises(mlopt.DisagreementError, match=r"the point is the cause.*its solver left it about") as caught,
    ):
        mlopt.check_hypergradient(left_by_a_solver(2.2, mlopt.Dense()), oracle="resolve")
    check = caught.value.check
    assert check.error == pytest.approx(0.21, rel=1e-6)  # of 2.2^2 to 2^2
    assert check.error_at_solution < 1e-7
    assert "linear solve" not in str(caught.value)


def test_remarks_of_doubtful_reports_are_stated() -> None:
    problem = quadratic("two", mlopt.Neumann(iterations=2, step_size=10.0)).problem
    with (
        pytest.warns(mlopt.TrustWarning),
        pytest.raises(mlopt.DisagreementError, match="Doubtful: level 'y': the series does not converge") as caught,
    ):
        mlopt.check_hypergradient(problem)
    assert "The linear solve" not in str(caught.value)


def test_a_small_parameter_is_not_hidden_by_a_large_one() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large = nn.Parameter(torch.ones(2, dtype=torch.float64))
            self.small = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def outer(module: nn.Module, batch: None, *, y: nn.Module) -> Tensor:
        return 100 * module.large.square().sum() + y().sum()

    def inner(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
        return module().square().sum() - (module() * x.small).sum()

    y = mlopt.Level("y", mlopt.variables(torch.ones(2, dtype=torch.float64) / 2), inner, estimator=Flipped())
    with pytest.raises(mlopt.DisagreementError, match=r"off by 2\.0e\+00 \(small\)") as caught:
        mlopt.check_hypergradient(mlopt.Problem(mlopt.Level("x", Pair(), outer), y))
    assert caught.value.check.error < 1e-2
    assert [row.name for row in caught.value.check.rows] == ["large", "small", "all"]


def dropped(estimator: mlopt.Estimator) -> mlopt.Problem:
    """Return a regression with dropout on its inputs, at a point that is not a solution for any mask."""
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def outer(module: nn.Module, batch: None, *, y: nn.Module) -> Tensor:
        return (inputs @ y() - 1).square().mean()

    def inner(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
        losses = (nn.functional.dropout(inputs, 0.5) @ module() - 1).square()
        return (x().sigmoid() * losses).mean() + module().square().sum() / 10

    weights = mlopt.variables(torch.zeros(8, dtype=torch.float64))
    y = mlopt.variables(torch.zeros(4, dtype=torch.float64))
    return mlopt.Problem(mlopt.Level("x", weights, outer), mlopt.Level("y", y, inner, estimator=estimator))


@pytest.mark.parametrize("seed", [0, 1])
def test_levels_are_solved_again_for_the_masks_of_the_seed(seed: int) -> None:
    with pytest.raises(mlopt.DisagreementError, match="the point is the cause") as caught:
        mlopt.check_hypergradient(dropped(mlopt.Dense()), oracle="resolve", seed=seed)
    assert caught.value.check.error_at_solution < 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("oracle", ["dense", "resolve"])
def test_nothing_moves(oracle: str, dtype: torch.dtype) -> None:
    problem = stateful_problem(mlopt.Identity(), dtype=dtype)
    optimizers = train_a_little(problem)
    before, workspace = snapshot(problem, optimizers), contents(problem.workspace)
    with pytest.raises(mlopt.EstimatorError):
        mlopt.check_hypergradient(problem, oracle=oracle, directions=1, tolerance=1e-3)
    assert same(before, snapshot(problem, optimizers))
    assert same(contents(problem.workspace), workspace)


@pytest.mark.parametrize("fatal", [1, 20, 40])
def test_nothing_moves_when_a_loss_raises_during_a_check(fatal: int) -> None:
    problem = stateful_problem(mlopt.Identity(), fatal=fatal)
    before = snapshot(problem)
    with pytest.raises(FloatingPointError):
        mlopt.check_hypergradient(problem, oracle="resolve")
    assert same(before, snapshot(problem))


def test_the_table_depends_only_on_the_seed() -> None:
    def table(seed: int) -> str:
        with pytest.raises(mlopt.DisagreementError) as caught:
            mlopt.check_hypergradient(dropped(mlopt.Identity()), seed=seed)
        return str(caught.value.check)

    assert table(3) == table(3)
    assert table(3) != table(4)


def test_batches_are_the_given_ones_or_the_first_of_the_data() -> None:
    seen: list[float] = []

    def outer(module: nn.Module, batch: Tensor) -> Tensor:
        seen.append(float(batch))
        return (module() * batch).sum()

    level = mlopt.Level("x", mlopt.variables(torch.ones(2)), outer, data=[torch.tensor(1.0), torch.tensor(2.0)])
    problem = mlopt.Problem(level)
    mlopt.check_hypergradient(problem)
    assert set(seen) == {1.0}
    seen.clear()
    mlopt.check_hypergradient(problem, {"x": torch.tensor(5.0)})
    assert set(seen) == {5.0}
    with pytest.raises(mlopt.ProblemError, match="there is no level 'z'"):
        mlopt.check_hypergradient(problem, {"z": None})


def test_single_precision() -> None:
    case = quadratic("chain_of_three", mlopt.Dense(), dtype=torch.float32)
    check = mlopt.check_hypergradient(case.problem, oracle="resolve", tolerance=1e-2)
    assert check.error < 2e-3


def test_an_oracle_that_is_too_coarse_is_an_error() -> None:
    case = quadratic("chain_of_three", mlopt.Dense(), dtype=torch.float32)
    with pytest.raises(mlopt.EstimatorError, match="the 'resolve' oracle is only accurate to") as caught:
        mlopt.check_hypergradient(case.problem, oracle="resolve", tolerance=1e-9)
    assert not isinstance(caught.value, mlopt.DisagreementError)


def test_a_level_that_cannot_be_solved_again_is_an_error() -> None:
    """The minimum is at a kink, where the gradient does not vanish; equal values there do not prove agreement."""

    def outer(module: nn.Module, batch: None, *, y: nn.Module) -> Tensor:
        return (module() * y()).sum()

    def inner(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
        return module().abs().sum() + (module() - 0.1 * x()).square().sum()

    x, y = (mlopt.variables(torch.ones(3, dtype=torch.float64) / k) for k in (1, 2))
    y = mlopt.Level("y", y, inner, estimator=mlopt.Dense())
    with pytest.raises(
        mlopt.EstimatorError, match=r"the 'resolve' oracle is only accurate to .*a smooth loss \(no ReLU\)"
    ):
        mlopt.check_hypergradient(mlopt.Problem(mlopt.Level("x", x, outer), y), oracle="resolve")


def test_without_second_derivatives_the_error_names_the_other_oracle_and_that_works() -> None:
    def outer(module: nn.Module, batch: None, *, y: nn.Module) -> Tensor:
        return (module() * y()).sum()

    def inner(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
        return OnceDifferentiable.apply(module()).square().sum() - (module() * x()).sum()

    start = torch.arange(1.0, 4.0, dtype=torch.float64)
    estimator = mlopt.ConjugateGradient(products="finite_difference", rtol=1e-8)
    problem = mlopt.Problem(
        mlopt.Level("x", mlopt.variables(start), outer),
        mlopt.Level("y", mlopt.variables((start / 4) ** (1 / 3)), inner, estimator=estimator),
    )
    with pytest.raises(mlopt.EstimatorError, match="use oracle='resolve', which does not"):
        mlopt.check_hypergradient(problem)
    assert mlopt.check_hypergradient(problem, oracle="resolve", tolerance=1e-5).error < 1e-6


def test_the_error_for_a_large_level_names_the_other_oracle() -> None:
    def outer(module: nn.Module, batch: None, *, y: nn.Module) -> Tensor:
        return (module() * y().sum()).sum()

    def inner(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
        return (module() - x().sum()).square().sum()

    problem = mlopt.Problem(
        mlopt.Level("x", mlopt.variables(torch.ones(1)), outer),
        mlopt.Level("y", mlopt.variables(torch.ones(5_001)), inner, estimator=mlopt.Identity()),
    )
    with pytest.raises(mlopt.EstimatorError, match=r"level 'y' has 5,001 variables.*use oracle='resolve'"):
        mlopt.check_hypergradient(problem)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"oracle": "exact"}, "oracle='exact'; it must be 'dense' or 'resolve'"),
        ({"tolerance": 0}, "tolerance=0; it must be a finite number > 0"),
        ({"tolerance": "1%"}, "tolerance='1%'; it must be a finite number > 0"),
        ({"directions": 0}, "directions=0; it must be a whole number >= 1"),
        ({"seed": None}, "seed=None; it must be a whole number"),
    ],
)
def test_arguments(arguments: Mapping[str, Any], sentence: str) -> None:
    with pytest.raises(mlopt.ArgumentError, match=sentence):
        mlopt.check_hypergradient(quadratic("two", mlopt.Dense()).problem, **arguments)


def test_arguments_of_other_calls() -> None:
    problem = quadratic("two", mlopt.Dense()).problem
    with pytest.raises(mlopt.ArgumentError, match="diagnose: seed='0'; it must be a whole number"):
        mlopt.diagnose(problem, seed="0")  # type: ignore[arg-type]
    with pytest.raises(mlopt.ArgumentError, match=r"hypergradient: seed=0\.5; it must be a whole number, or None"):
        mlopt.hypergradient(problem, seed=0.5)  # type: ignore[arg-type]
    with pytest.raises(mlopt.ArgumentError, match=r"hypergradient: problem=\(Level.*; it must be an mlopt\.Problem"):
        mlopt.hypergradient(problem.levels)  # type: ignore[arg-type]


@drawn(8)
@given(seed=seeds, size=st.integers(1, 12), condition=st.floats(1.0, 1e3))
def test_the_minimiser_reaches_the_precision_of_gradients(seed: int, size: int, condition: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    matrix = (basis * condition ** torch.linspace(0, 1, size, dtype=torch.float64)) @ basis.T
    solution = torch.randn(size, generator=generator, dtype=torch.float64)

    def objective(x: Tensor) -> tuple[float, Tensor]:
        gap = x - solution
        quartic = gap.square().sum() ** 2
        return float(gap @ matrix @ gap / 2 + quartic + 7.0), matrix @ gap + 4 * gap.square().sum() * gap

    minimum = minimize(objective, torch.zeros(size, dtype=torch.float64), tolerance=1e-11)
    assert minimum.gradient_norm < 1e-11
    assert float((minimum.variables - solution).norm()) < 1e-10


def test_the_minimiser_stops_if_steps_no_longer_help() -> None:
    minimum = minimize(lambda x: (float(x.abs().sum()), x.sign()), torch.full((2,), 0.3), tolerance=1e-6)
    assert minimum.gradient_norm > 1.0
    assert minimum.steps < 100


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0])
def test_outer_variables_of_every_size_are_resolved(size: float) -> None:
    """The oracle is exp(u / size) / size, from displacements that suit the variables."""

    def inner(module: nn.Module, batch: Any, *, u: nn.Module) -> Tensor:
        return (module() - (u() / size).exp()).square().sum()

    start = torch.tensor([0.5, 1.0], dtype=torch.float64)
    problem = mlopt.Problem(
        mlopt.Level("u", mlopt.variables(size * start), lambda module, batch, *, y: y().sum()),
        mlopt.Level("y", mlopt.variables(start.exp()), inner, estimator=mlopt.Dense()),
    )
    check = mlopt.check_hypergradient(problem, oracle="resolve", tolerance=1e-3)
    assert check.error < 1e-3
