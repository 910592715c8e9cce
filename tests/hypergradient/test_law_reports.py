"""Law 7: no silent failure. Reports, warnings or errors name non-convergence, negative curvature and non-finite values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from core_cases import PRODUCTS, distance
from functions import OnceDifferentiable
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import mlopt
from mlopt import linear
from mlopt.testing import quadratic

ONES = torch.ones(2, dtype=torch.float64)


def outer(module: nn.Module, batch: None, *, y: nn.Module) -> Tensor:
    return (module() * y()).sum()


def inner(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
    return (module() - x()).square().sum()


def build(
    estimator: mlopt.Estimator, inner: Callable[..., Any] = inner, outer: Callable[..., Any] = outer
) -> mlopt.Problem:
    return mlopt.Problem(
        mlopt.Level("x", mlopt.variables(ONES * torch.tensor([1.0, 2.0])), outer),
        mlopt.Level("y", mlopt.variables(ONES * torch.tensor([0.5, 0.3])), inner, estimator=estimator),
    )


def report_of(estimator: mlopt.Estimator, inner: Callable[..., Any] = inner) -> mlopt.Report:
    return mlopt.hypergradient(build(estimator, inner)).reports["y"]


def test_exhausted_iterations_are_not_converged() -> None:
    reports = {
        k: mlopt.hypergradient(
            quadratic("two", mlopt.ConjugateGradient(iterations=k, rtol=1e-10), size=3, condition=50.0).problem
        ).reports["y"]
        for k in (2, 20)
    }
    assert reports[2].converged is False
    assert reports[2].iterations == 2
    assert 1e-10 < reports[2].residual < 1
    assert reports[20].converged is True
    assert reports[20].residual <= 1e-10


def test_the_worst_of_many_solves_is_reported() -> None:
    """A nested level takes many solves; the report must include a failure of one."""
    rules = {"y": mlopt.Dense(), "z": mlopt.ConjugateGradient(iterations=1, rtol=1e-10)}
    report = mlopt.hypergradient(quadratic("nested", rules).problem).reports["z"]
    assert report.solves > 3
    assert report.converged is False
    assert report.residual > 1e-3


class Scripted(linear.LinearSolver):
    """A solver whose first solve fails; the others claim to be perfect."""

    damping = 0.0

    def __init__(self) -> None:
        self.solves = 0

    def _solve(self, matvec: Any, rhs: Any, size: float, initial: Any) -> linear.LinearSolution:
        self.solves += 1
        good = self.solves > 1
        return linear.LinearSolution(
            value=rhs,
            residual=1e-12 if good else 0.5,
            iterations=2,
            products=3,
            converged=good,
            curvature=(1.0, 2.0) if good else (-1.0, 1.5),
            remark="" if good else "went wrong",
        )


def test_one_bad_solve_is_reported_although_good_ones_follow() -> None:
    solver = Scripted()
    rules = {"y": mlopt.Dense(), "z": mlopt.LinearSolve(solver=solver)}
    report = mlopt.hypergradient(quadratic("nested", rules).problem).reports["z"]
    assert solver.solves > 3
    assert (report.solves, report.iterations, report.products) == (solver.solves, 2 * solver.solves, 3 * solver.solves)
    assert (report.residual, report.converged) == (0.5, False)
    assert report.curvature == (-1.0, 2.0)
    assert report.remarks == ("went wrong",)


def test_negative_curvature_at_once_leaves_a_step_of_steepest_descent() -> None:
    def saddle(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
        y = module()
        return y[0] ** 2 - 0.5 * y[1] ** 2 - (y * x()).sum()

    # v = x = (1, 2): <v, H v> = 2 - 4 < 0 at once, so q = v ||v|| / ||H v||, and the mixed product is -q.
    result = mlopt.hypergradient(build(mlopt.ConjugateGradient(), saddle))
    report = result.reports["y"]
    assert report.converged is False
    assert report.iterations == 0
    assert report.curvature[0] == pytest.approx(-0.4)
    assert report.remarks == ("negative curvature -0.4 at iteration 1; raise the damping",)
    q = torch.tensor([1.0, 2.0]) * (5 / 8) ** 0.5
    torch.testing.assert_close(result.gradient["value"], torch.tensor([0.5, 0.3]) + q)
    # Damping above it makes the matrix positive definite, and the solve is the damped one.
    damped = mlopt.hypergradient(build(mlopt.ConjugateGradient(damping=2.0), saddle))
    assert damped.reports["y"].converged is True
    assert distance(damped.gradient["value"], torch.tensor([0.5 + 1 / 4, 0.3 + 2 / 1])) < 1e-12


def test_dense_reports_negative_curvature() -> None:
    def saddle(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
        return module()[0] ** 2 - 0.5 * module()[1] ** 2 - (module() * x()).sum()

    report = report_of(mlopt.Dense(), saddle)
    assert report.curvature == pytest.approx((-1.0, 2.0))
    assert report.remarks == ("negative curvature -1",)


def test_the_divergence_of_a_series_is_reported() -> None:
    report = report_of(mlopt.Neumann(iterations=100, step_size=1.2))
    assert report.converged is False
    assert report.iterations < 100
    assert report.remarks == ("the series does not converge (curvature up to 2 at step size 1.2)",)


def test_the_divergence_of_a_short_series_shows_in_its_residual() -> None:
    report = report_of(mlopt.Neumann(iterations=5, step_size=1.2))
    assert report.converged is False
    assert report.residual == pytest.approx(1.4**5)


def test_the_divergence_of_a_short_series_is_reported() -> None:
    assert "does not converge" in " ".join(report_of(mlopt.Neumann(iterations=5, step_size=1.2)).remarks)


def test_the_identity_measures_nothing() -> None:
    report = report_of(mlopt.Identity())
    assert (report.converged, report.residual, report.products) == (None, None, 0)


def test_a_difference_step_is_reported() -> None:
    report = report_of(mlopt.FiniteDifference())
    # A displacement of 1e-5 along v = x = (1, 2), in units of v.
    assert report.step == pytest.approx(1e-5 / 5**0.5)
    assert report_of(mlopt.Identity()).step is None


@pytest.mark.parametrize("name", ["x", "y"])
def test_a_loss_that_is_not_finite_names_its_level(name: str) -> None:
    def broken(module: nn.Module, batch: None, *, y: nn.Module) -> Tensor:
        return (module() * y()).sum() * float("inf")

    def broken_inner(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
        return (module() - x()).square().sum() * float("nan")

    problem = build(mlopt.Neumann(), outer=broken) if name == "x" else build(mlopt.Neumann(), broken_inner)
    with pytest.raises(mlopt.NonFiniteError, match=f"level '{name}'"):
        mlopt.hypergradient(problem)


def test_a_cotangent_that_is_not_finite_names_its_level() -> None:
    """A finite loss with an infinite slope: sqrt at zero."""

    def steep(module: nn.Module, batch: None, *, y: nn.Module) -> Tensor:
        return module().sum() + (y() - y().detach()).sqrt().sum()

    with pytest.raises(mlopt.NonFiniteError, match=r"level 'y': the right-hand side .* cotangent"):
        mlopt.hypergradient(build(mlopt.ConjugateGradient(), outer=steep))


def _steep_direct(module: nn.Module, batch: None, *, y: nn.Module) -> Tensor:
    return (module() - module().detach()).sqrt().sum() + y().sum()


def _steep_mixed(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
    return module().square().sum() + (module() * (x() - x().detach()).sqrt()).sum()


def _broken(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
    return (module() - x()).square().sum() * float("nan")


@pytest.mark.parametrize("where", ["direct", "mixed", "identity"])
def test_a_gradient_that_is_not_finite_raises(where: str) -> None:
    problem = {
        "direct": build(mlopt.Dense(), outer=_steep_direct),
        "mixed": build(mlopt.Dense(), _steep_mixed),
        "identity": build(mlopt.Identity(), _broken),
    }[where]
    with pytest.raises(mlopt.NonFiniteError):
        mlopt.hypergradient(problem)


@pytest.mark.parametrize("products", PRODUCTS)
def test_a_kernel_without_a_second_derivative_is_named(products: str) -> None:
    def cdist(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
        return torch.cdist(module()[None], x()[None]).square().sum()

    problem = build(mlopt.ConjugateGradient(products=products, rtol=1e-6), cdist)
    if products == "finite_difference":
        expected = mlopt.hypergradient(build(mlopt.Dense())).gradient["value"]
        assert distance(mlopt.hypergradient(problem).gradient["value"], expected) < 1e-6
        return
    with pytest.raises(mlopt.SecondDerivativeError, match=r"_cdist_.*; use products='finite_difference', or a kernel"):
        mlopt.hypergradient(problem)


@pytest.mark.parametrize(
    ("products", "kind"),
    [
        ("autograd", "once"),
        ("autograd", "once_constant"),
        ("forward", "once"),
        ("forward", "once_constant"),
        ("forward", "checkpoint"),
    ],
)
def test_functions_without_a_second_derivative_are_named(products: str, kind: str) -> None:
    def once(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
        return OnceDifferentiable.apply(module()).square().sum() + (module() - x()).square().sum()

    def checkpointed(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
        square = torch.utils.checkpoint.checkpoint(lambda y: y.square().sum(), module(), use_reentrant=False)
        return square + (module() * x()).sum()

    def once_constant(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
        # The cotangent of the function is a constant, so the gradient's graph does not contain it.
        return OnceDifferentiable.apply(module()).sum() + (module() - x()).square().sum()

    loss = {"once": once, "once_constant": once_constant, "checkpoint": checkpointed}[kind]
    with pytest.raises(mlopt.SecondDerivativeError):
        mlopt.hypergradient(build(mlopt.ConjugateGradient(products=products), loss))


class Attention(nn.Module):
    """One attention layer of two heads; PyTorch picks the kernel."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.project = nn.Parameter(torch.randn(4, 12, generator=generator, dtype=torch.float64) / 2)

    def forward(self, inputs: Tensor) -> Tensor:
        query, key, value = (inputs @ self.project).reshape(3, 5, 2, 6).transpose(1, 2).chunk(3, dim=-1)
        return scaled_dot_product_attention(query, key, value).flatten()


def attention_problem(estimator: mlopt.Estimator) -> mlopt.Problem:
    inputs = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def training(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
        return ((module(inputs) - x().repeat(30)).square().mean()) + module.project.square().sum()

    def held_out(module: nn.Module, batch: None, *, y: nn.Module) -> Tensor:
        return y(inputs).square().mean() + module().square().sum()

    return mlopt.Problem(
        mlopt.Level("x", mlopt.variables(ONES), held_out), mlopt.Level("y", Attention(), training, estimator=estimator)
    )


def test_attention_is_differentiated_twice_by_its_plain_kernel() -> None:
    assert _fused(Attention()(torch.ones(3, 5, 4, dtype=torch.float64)))
    gradients = {p: mlopt.hypergradient(attention_problem(mlopt.Dense(products=p))).gradient["value"] for p in PRODUCTS}
    assert distance(gradients["forward"], gradients["autograd"]) < 1e-9
    # Only finite differences call the fused kernel.
    assert distance(gradients["finite_difference"], gradients["autograd"]) < 1e-6


def _fused(tensor: Tensor) -> bool:
    """Return True if the graph of a tensor contains a fused attention kernel."""
    pending, seen = [tensor.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "FlashAttention" in type(node).__name__:
            return True
        pending.extend(n for n, _ in node.next_functions)
    return False


def test_all_products_agree_on_batch_norm_in_train_mode() -> None:
    def problem(products: str) -> mlopt.Problem:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
        inputs = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))

        def training(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
            ridge = sum(p.square().sum() for p in module.parameters())
            return (module(inputs) * x() - inputs).square().mean() + 0.5 * ridge

        def held_out(module: nn.Module, batch: None, *, y: nn.Module) -> Tensor:
            return y(-inputs).square().mean() + module().sum()

        return mlopt.Problem(
            mlopt.Level("x", mlopt.variables(ONES), held_out),
            mlopt.Level("y", network, training, estimator=mlopt.Dense(products=products)),
        )

    gradients = {products: mlopt.hypergradient(problem(products)).gradient["value"] for products in PRODUCTS}
    assert distance(gradients["forward"], gradients["autograd"]) < 1e-9
    assert distance(gradients["finite_difference"], gradients["autograd"]) < 1e-6


def test_an_estimator_that_is_not_implicit_cannot_be_nested() -> None:
    class Other(mlopt.Estimator):
        def linearize(self, point: Any, level: str) -> Any:
            raise AssertionError

    problem = quadratic("nested", {"y": mlopt.Dense(), "z": Other()}).problem
    with pytest.raises(mlopt.EstimatorError, match=r"level 'z' is solved inside 'y'.*cannot be nested"):
        mlopt.hypergradient(problem)


def saddle(module: nn.Module, batch: None, *, x: nn.Module) -> Tensor:
    """A loss whose Hessian has the eigenvalues 1 and -1."""
    first, second = module()
    return (first * first - second * second) / 2 + (module() * x()).sum()


def pulled(module: nn.Module, batch: None, *, y: nn.Module) -> Tensor:
    return (y() * torch.tensor([1.0, 2.0])).sum()


def saddle_problem(estimator: mlopt.Estimator) -> mlopt.Problem:
    return mlopt.Problem(
        mlopt.Level("x", mlopt.variables(torch.ones(2)), pulled, optimizer=partial(torch.optim.SGD, lr=0.1)),
        mlopt.Level(
            "y", mlopt.variables(torch.ones(2)), saddle, optimizer=partial(torch.optim.SGD, lr=0.1), estimator=estimator
        ),
    )


def test_an_untrustworthy_solve_is_warned_about() -> None:
    with pytest.warns(mlopt.TrustWarning, match="level 'y': negative curvature -.*raise the damping"):
        mlopt.hypergradient(saddle_problem(mlopt.ConjugateGradient()))


@pytest.mark.parametrize("warm_start", [False, True])
@pytest.mark.filterwarnings("ignore::mlopt.TrustWarning")
def test_outer_variables_move_at_negative_curvature(warm_start: bool) -> None:
    """The Hessian is orthogonal, so q = v = (1, 2) in each step, and the mixed product is the identity."""
    problem = saddle_problem(mlopt.ConjugateGradient(warm_start=warm_start))
    mlopt.solve(problem, steps=3, progress=False)
    torch.testing.assert_close(problem["x"].module.value.detach(), torch.ones(2) + 0.3 * torch.tensor([1.0, 2.0]))


@pytest.mark.filterwarnings("error::mlopt.TrustWarning")
def test_an_intended_approximation_is_not_warned_about() -> None:
    for estimator in (mlopt.MINRES(), mlopt.Dense(), mlopt.Identity()):
        mlopt.hypergradient(saddle_problem(estimator))
    case = quadratic("two", mlopt.ConjugateGradient(iterations=1))
    assert mlopt.hypergradient(case.problem).reports["y"].converged is False
