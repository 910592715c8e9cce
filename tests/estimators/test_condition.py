"""Pullbacks through levels that a residual defines: closed forms, other ways to the same derivative, reports."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from condition_cases import SIZE, LinearProblem, equilibrium
from core_cases import distance, drawn, gradient_of, point_of, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

import mlopt
from mlopt import Level, Problem
from mlopt.estimators import Condition
from mlopt.tensors import dot
from mlopt.testing import quadratic

EXACT = {
    "dense": mlopt.Dense(),
    "gmres": mlopt.GMRES(iterations=50, rtol=1e-13),
    "gmres forward": mlopt.GMRES(iterations=50, rtol=1e-13, products="forward"),
    "gmres differences": mlopt.GMRES(iterations=50, rtol=1e-13, products="finite_difference"),
    "neumann": mlopt.Neumann(iterations=20_000, step_size=0.15, rtol=1e-13),
    "own solver": mlopt.LinearSolve(solver=mlopt.linear.GMRES(iterations=SIZE)),
}


@st.composite
def problems(draw: st.DrawFn) -> LinearProblem:
    """Draw one to four levels, each a loss or a condition that uses some of the earlier ones, listed in any order."""
    kinds = draw(st.lists(st.booleans(), min_size=1, max_size=4).filter(lambda kinds: not all(kinds)))
    edges = [draw(st.lists(st.integers(0, k - 1), unique=True)) if k else [] for k in range(len(kinds))]
    order = draw(st.permutations(range(len(kinds))))
    return LinearProblem.drawn(kinds, edges, order, draw(seeds))


@pytest.mark.parametrize("name", ["dense", "gmres"])
@drawn(60)
@given(case=problems())
def test_drawn_graphs_of_linear_conditions_and_losses_have_the_closed_form(name: str, case: LinearProblem) -> None:
    assert distance(gradient_of(case.problem(EXACT[name], mlopt.Dense())), case.exact()) < 1e-8


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("edges", [[[]], [[], [0]], [[], [0], [0], [1, 2]]], ids=["one", "chain", "diamond"])
def test_every_solver_and_product_has_the_closed_form(edges: list[list[int]], name: str) -> None:
    case = LinearProblem.drawn([False] * len(edges), edges, range(len(edges))[::-1], seed=3)
    assert distance(gradient_of(case.problem(EXACT[name], mlopt.Dense())), case.exact()) < 1e-8


@pytest.mark.parametrize("name", EXACT)
def test_a_layer_in_equilibrium_has_the_derivative_of_an_unrolled_one(name: str) -> None:
    problem, unrolled = equilibrium(1, estimator=EXACT[name])
    outer = problem.outermost.module().detach().requires_grad_()
    (expected,) = torch.autograd.grad(unrolled(outer), outer)
    assert distance(gradient_of(problem), expected) < 1e-8


@pytest.mark.parametrize("products", ["autograd", "forward", "finite_difference"])
@pytest.mark.parametrize("restart", [1, 3])
def test_a_cyclic_permutation_has_the_closed_form_where_restarts_stagnate(restart: int, products: str) -> None:
    """F = P x - M u with a cyclic P, on which restarted GMRES stays at zero; u_bar = M^T P v. The report says what was used."""
    size = 8
    generator = torch.Generator().manual_seed(2)
    shift = torch.roll(torch.eye(size, dtype=torch.float64), 1, 0)
    mixing, start = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((size, 3), (3,)))
    target = torch.zeros(size, dtype=torch.float64)
    target[2] = 1.0

    def problem(restart: int | None) -> Problem:
        return Problem(
            Level("u", mlopt.variables(start), lambda u, batch, *, x: x() @ target + 0 * u().sum()),
            Level(
                "x",
                mlopt.variables(shift.T @ mixing @ start),
                residual=lambda x, batch, *, u: shift @ x() - mixing @ u(),
                estimator=mlopt.GMRES(iterations=6, restart=restart, products=products),
            ),
        )

    result = mlopt.hypergradient(problem(restart))
    assert distance(result.gradient["value"], mixing.T @ shift @ target) < 1e-8
    report = result.reports["x"]
    assert report.converged is True
    assert any("conjugate gradients on the normal equations lowered it to" in remark for remark in report.remarks)
    # The pushforward solves the transposed system.
    point = point_of(problem(restart))
    rule = point.problem["x"].estimator.linearize(point, "x")
    tangent = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    (moved,) = rule.pushforward({"u": (tangent,)})["x"]
    assert distance(moved, shift.T @ mixing @ tangent) < 1e-8


def test_the_identity_is_a_backward_pass_without_a_solve() -> None:
    """Jacobian-free: the derivative of one more iteration of the map at the solution."""
    problem, _ = equilibrium(2, estimator=mlopt.Identity())
    u, x = problem["u"].module(), problem["layer"].module()
    once = x.detach() - problem["layer"].residual(lambda: x.detach(), None, u=lambda: u)
    loss = problem["u"].loss(lambda: u, None, layer=lambda: once)
    (expected,) = torch.autograd.grad(loss, u)
    assert distance(gradient_of(problem), expected) < 1e-12
    scaled, _ = equilibrium(2, estimator=mlopt.Identity(scale=0.5))
    direct = 2 * u.detach()
    assert distance(gradient_of(scaled), direct + (expected - direct) / 2) < 1e-12


@drawn(15)
@given(seed=seeds)
def test_the_pushforward_is_the_transpose(seed: int) -> None:
    problem, _ = equilibrium(seed, estimator=mlopt.GMRES(iterations=30, rtol=1e-13))
    generator = torch.Generator().manual_seed(seed)
    v, du = (tuple(torch.randn(5, generator=generator) for _ in range(1)) for _ in range(2))
    rule = problem["layer"].estimator.linearize(point_of(problem), "layer")
    assert isinstance(rule, Condition)
    pulled, pushed = rule.pullback({"layer": v}), rule.pushforward({"u": du})
    assert float(dot(pulled["u"], du)) == pytest.approx(float(dot(v, pushed["layer"])), rel=1e-10)


def test_the_oracles_agree_with_it() -> None:
    for name in ("gmres", "gmres differences"):
        problem, _ = equilibrium(4, estimator=EXACT[name])
        problem["layer"].module.value.data.mul_(0.9)
        assert mlopt.check_hypergradient(problem, tolerance=1e-8).error < 1e-8
        resolved = mlopt.check_hypergradient(problem, oracle="resolve", tolerance=0.5)
        assert resolved.error_at_solution < 1e-7
        assert 1e-3 < resolved.moved["layer"] < 0.2


class TwoTensors(nn.Module):
    """A matrix and a vector, and a parameter that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.b = nn.Parameter(torch.zeros(3))
        self.a = nn.Parameter(torch.zeros(2, 2))


def test_several_variables_of_several_shapes() -> None:
    """Two coupled equations, not linear; each form in which a residual may be returned has the same derivative."""
    generator = torch.Generator().manual_seed(0)
    matrix, mixing = (torch.randn(3, 3, generator=generator) + 3 * torch.eye(3) for _ in range(2))

    def parts(module: Any, u: Any) -> dict[str, Tensor]:
        return {
            "a": module.a + 0.1 * module.b.sum() * module.a.T - 1,
            "b": matrix @ module.b + 0.1 * module.a.sum() ** 2 - mixing @ u(),
        }

    forms = {
        "mapping": lambda module, batch, *, u: parts(module, u),
        "list": lambda module, batch, *, u: [parts(module, u)[name] for name in ("b", "a")],
        "tuple": lambda module, batch, *, u: tuple(parts(module, u)[name] for name in ("b", "a")),
    }
    gradients = {}
    for form, residual in forms.items():
        problem = Problem(
            Level("u", mlopt.variables(torch.ones(3)), lambda u, batch, *, x: x.b.square().sum() + x.a[0, 1]),
            Level("x", TwoTensors(), residual=residual, estimator=mlopt.GMRES()),
        )
        check = mlopt.check_hypergradient(problem, oracle="resolve", tolerance=1e3)
        assert check.error_at_solution < 1e-7
        gradients[form] = gradient_of(problem)
    assert torch.equal(gradients["mapping"], gradients["list"])
    assert torch.equal(gradients["tuple"], gradients["list"])


def test_the_decay_and_the_sign_of_the_optimizer_are_a_part_of_the_condition() -> None:
    """Steps on F with decay c end where F + c x = 0; steps that maximise end at -F + c x = 0."""
    matrix = torch.tensor([[2.0, 1.0], [-1.0, 3.0]])
    weight = torch.tensor([1.0, -2.0])
    for maximize in (False, True):
        sign = -1.0 if maximize else 1.0
        total = sign * matrix * sign + 0.3 * torch.eye(2)
        problem = Problem(
            Level(
                "u", mlopt.variables(torch.ones(2)), lambda u, batch, *, x: x() @ weight, optimizer=partial(SGD, lr=0.0)
            ),
            Level(
                "x",
                mlopt.variables(torch.zeros(2)),
                residual=lambda x, batch, *, u, sign=sign: sign * (matrix @ x()) - sign * u(),
                optimizer=partial(SGD, lr=0.2, weight_decay=0.3, maximize=maximize),
                steps=400,
                estimator=mlopt.Dense(),
            ),
        )
        mlopt.solve(problem, steps=1, progress=False)
        torch.testing.assert_close(problem["x"].module().detach(), torch.linalg.solve(total, torch.ones(2)))
        torch.testing.assert_close(gradient_of(problem), torch.linalg.solve(total.T, weight))


def test_variables_that_the_optimizer_holds_at_a_bound_do_not_move() -> None:
    """A complementarity problem: x >= 0, F >= 0; the equation of a held variable drops out with it."""
    matrix, weight = torch.tensor([[2.0, 1.0], [-1.0, 3.0]]), torch.tensor([1.0, 1.0])

    class Projected(SGD):
        def step(self, closure: Any = None) -> None:
            super().step()
            for group in self.param_groups:
                for variable in group["params"]:
                    variable.data.clamp_(min=0.0)

    problem = Problem(
        Level(
            "u",
            mlopt.variables(torch.tensor([1.0, -4.0])),
            lambda u, batch, *, x: x() @ weight,
            optimizer=partial(SGD, lr=0.0),
        ),
        Level(
            "x",
            mlopt.variables(torch.ones(2)),
            residual=lambda x, batch, *, u: matrix @ x() - u(),
            optimizer=partial(Projected, lr=0.2),
            steps=300,
            estimator=mlopt.GMRES(),
        ),
    )
    mlopt.solve(problem, steps=1, progress=False)
    torch.testing.assert_close(problem["x"].module().detach(), torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(gradient_of(problem), torch.tensor([0.5, 0.0]))


def test_curvature_data_are_for_the_derivative_by_the_own_variables() -> None:
    def residual(x: Any, batch: Any, *, u: Any) -> Tensor:
        return batch * x() - batch * u()

    problem = Problem(
        Level("u", mlopt.variables(torch.ones(1)), lambda u, batch, *, x: x().sum()),
        Level(
            "x",
            mlopt.variables(torch.ones(1)),
            residual=residual,
            data=[torch.tensor(2.0)],
            estimator=mlopt.GMRES(curvature_data=[torch.tensor(8.0)]),
        ),
    )
    torch.testing.assert_close(gradient_of(problem), torch.tensor([0.25]))


def test_reports_hold_the_residual_and_a_bound_on_the_distance() -> None:
    matrix = torch.tensor([[2.0, 5.0], [-5.0, 3.0]])
    for rotation, bounded in ((matrix, True), (matrix - 2.5 * torch.eye(2), False)):
        problem = Problem(
            Level("u", mlopt.variables(torch.ones(2)), lambda u, batch, *, x: x().sum()),
            Level(
                "x",
                mlopt.variables(torch.ones(2)),
                residual=lambda x, batch, *, u, rotation=rotation: rotation @ x() - u(),
                estimator=mlopt.GMRES(iterations=2),
            ),
        )
        report = mlopt.hypergradient(problem).reports["x"]
        residual = rotation @ torch.ones(2) - torch.ones(2)
        assert report.gradient_norm == pytest.approx(float(residual.norm()))
        assert report.residual < 1e-12
        assert (report.converged, report.remarks) == (True, ())
        true = float((torch.linalg.solve(rotation, torch.ones(2)) - torch.ones(2)).norm())
        if bounded:
            size = 2**0.5
            assert report.curvature == (pytest.approx(2.0), pytest.approx(3.0))
            assert report.stationarity >= true / (size + true)
        else:
            assert report.stationarity is None


def test_a_condition_that_rotates_is_no_cause_for_doubt() -> None:
    """Its quotients <p, F_x p> are negative, which says nothing of a matrix that is not symmetric."""
    matrix = torch.tensor([[-0.1, 5.0], [-5.0, 0.3]])
    for estimator in (mlopt.Dense(), mlopt.GMRES()):
        problem = Problem(
            Level("u", mlopt.variables(torch.ones(2)), lambda u, batch, *, x: x().sum()),
            Level(
                "x",
                mlopt.variables(torch.ones(2)),
                residual=lambda x, batch, *, u: matrix @ x() - u(),
                estimator=estimator,
            ),
        )
        report = mlopt.hypergradient(problem).reports["x"]
        assert report.curvature[0] < 0
        assert (report.remarks, report.converged) == ((), True)


def test_a_singular_condition_is_doubtful() -> None:
    matrix = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    problem = Problem(
        Level("u", mlopt.variables(torch.ones(2)), lambda u, batch, *, x: x() @ torch.tensor([1.0, 2.0])),
        Level(
            "x",
            mlopt.variables(torch.ones(2)),
            residual=lambda x, batch, *, u: matrix @ x() - u(),
            estimator=mlopt.GMRES(),
        ),
    )
    with pytest.warns(mlopt.TrustWarning, match="level 'x': numerically singular"):
        mlopt.hypergradient(problem)


@pytest.mark.parametrize("products", ["autograd", "finite_difference"])
def test_a_detach_in_a_residual_is_found_by_differences(products: str) -> None:
    problem = Problem(
        Level("u", mlopt.variables(torch.ones(2)), lambda u, batch, *, x: x().sum()),
        Level(
            "x",
            mlopt.variables(torch.ones(2)),
            residual=lambda x, batch, *, u: 3 * x() + x().detach() * x() - u(),
            estimator=mlopt.GMRES(products=products),
        ),
    )
    with pytest.warns(mlopt.TrustWarning, match=r"derivatives of the residual .*detach\(\)"):
        mlopt.hypergradient(problem)


def test_a_warm_start_carries_the_solution_of_the_system_over() -> None:
    problem, _ = equilibrium(5, estimator=mlopt.GMRES(iterations=50, rtol=1e-6, warm_start=True))
    warm: dict[str, Any] = {}
    rule = problem["layer"].estimator.linearize(point_of(problem, warm), "layer")
    v = (torch.ones(5),)
    first = rule.pullback({"layer": v})
    again = problem["layer"].estimator.linearize(point_of(problem, warm), "layer")
    second = again.pullback({"layer": v})
    assert (rule.report.iterations > 1, again.report.iterations) == (True, 0)
    torch.testing.assert_close(first["u"], second["u"], rtol=1e-6, atol=1e-9)


def test_a_cotangent_of_zero_leaves_the_warm_start_alone() -> None:
    problem, _ = equilibrium(5, estimator=mlopt.GMRES(warm_start=True))
    kept = (torch.full((5,), 0.3),)
    warm: dict[str, Any] = {"layer": kept}
    rule = problem["layer"].estimator.linearize(point_of(problem, warm), "layer")
    for cotangent in ({"layer": (torch.zeros(5),)}, {}):
        assert torch.equal(rule.pullback(cotangent)["u"][0], torch.zeros(5))
    assert torch.equal(warm["layer"][0], kept[0])


def test_a_decay_that_moves_with_the_solution_is_doubtful() -> None:
    """As for a loss: the second moments of AdamW are those of the residual itself."""
    problem, _ = equilibrium(7, optimizer=partial(AdamW, lr=1e-2, betas=(0.5, 0.5), weight_decay=2.0), steps=200)
    problem["u"].module.value.data.mul_(3.0)
    outer = Level("u", problem["u"].module, problem["u"].loss, optimizer=partial(SGD, lr=0.0))
    with pytest.warns(
        mlopt.TrustWarning, match="the second moments of the optimiser of level 'layer' follow its gradient"
    ):
        mlopt.solve(Problem(outer, problem["layer"]), steps=1, progress=False)


def test_gmres_is_right_on_a_hessian() -> None:
    for shape in ("two", "chain_of_three", "nested"):
        case = quadratic(shape, mlopt.GMRES(iterations=50, rtol=1e-13))
        assert case.error(mlopt.hypergradient(case.problem).gradient) < 1e-8


@pytest.mark.parametrize(
    ("estimator", "reason"),
    [
        (mlopt.ConjugateGradient(), "its linear solver needs a symmetric matrix"),
        (mlopt.MINRES(), "its linear solver needs a symmetric matrix"),
        (mlopt.Nystrom(), "its linear solver needs a symmetric matrix"),
        (mlopt.SAMA(), "its linear solver needs a symmetric matrix"),
        (mlopt.ValueFunction(), "it differentiates the minimum of a loss"),
        (mlopt.Identity(streamed=True), "streamed=True is for a loss that is a Mixture"),
        (mlopt.Dense(products="gauss_newton"), "products='gauss_newton' approximate the Hessian"),
        (mlopt.GMRES(products="forward", compile=True), "compile=True compiles products"),
    ],
    ids=str,
)
def test_estimators_that_need_a_loss_are_refused(estimator: mlopt.Estimator, reason: str) -> None:
    with pytest.raises(mlopt.ProblemError, match=rf"level 'x': estimator=.*{reason}.*GMRES\(iterations=30\)"):
        Level(
            "x",
            mlopt.variables(torch.ones(1)),
            residual=lambda x, batch: x(),
            optimizer=partial(Adam, lr=0.1),
            estimator=estimator,
        )


def test_a_layer_in_equilibrium_is_a_layer_of_a_network() -> None:
    """A solution as tensors of autograd, in reverse and forward mode, at a u that comes from another layer."""
    problem, _ = equilibrium(6, estimator=mlopt.GMRES(rtol=1e-13), optimizer=partial(SGD, lr=1.0))
    map_ = problem["layer"].residual
    first = torch.linspace(-1.0, 1.0, 5).requires_grad_()

    def layer(start: Tensor) -> Tensor:
        return mlopt.solution(problem, "layer", values={"u": start.tanh()}, steps=300).variables["value"].exp()

    def unrolled(start: Tensor) -> Tensor:
        x = torch.zeros(5)
        for _ in range(300):
            x = x - map_(lambda x=x: x, None, u=lambda: start.tanh())
        return x.exp()

    torch.testing.assert_close(layer(first), unrolled(first))
    (ours,), (expected,) = (torch.autograd.grad(run(first).sum(), first) for run in (layer, unrolled))
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-12)
    along = torch.ones(5)
    ahead = torch.func.jvp(unrolled, (first.detach(),), (along,))[1]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(first.detach(), along)
        tangent = torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent
    torch.testing.assert_close(tangent, ahead, rtol=1e-8, atol=1e-12)
