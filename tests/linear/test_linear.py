"""Solvers of A x = b, compared with a factorisation of A."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from core_cases import distance, drawn, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mlopt
from mlopt import linear
from mlopt.tensors import Tensors, flatten, unflatten

SHAPES = [(2, 2), (), (3,), (1, 2, 1)]
SIZE = sum(math.prod(shape) for shape in SHAPES)


class System:
    """A x = b with a random symmetric A, in tensors of several shapes; it counts the products."""

    def __init__(self, seed: int, eigenvalues: Tensor) -> None:
        generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator)).Q
        self.matrix = (basis * eigenvalues) @ basis.T
        self.matrix = (self.matrix + self.matrix.T) / 2
        self.right = tuple(torch.randn(shape, generator=generator) for shape in SHAPES)
        self.start = tuple(torch.randn(shape, generator=generator) for shape in SHAPES)
        self.products = 0

    @classmethod
    def definite(cls, seed: int, condition: float) -> System:
        return cls(seed, condition ** torch.linspace(0, 1, SIZE))

    @classmethod
    def indefinite(cls, seed: int, negative: int) -> System:
        return cls(seed, torch.linspace(1, 3, SIZE) * (1 - 2.0 * (torch.arange(SIZE) < negative)))

    def solve(self, solver: linear.LinearSolver, *, warm: bool = False) -> linear.LinearSolution:
        return solver.solve(self.matvec, self.right, initial=self.start if warm else None)

    def matvec(self, vector: Tensors) -> Tensors:
        self.products += 1
        assert [x.shape for x in vector] == [*SHAPES]
        return unflatten(self.matrix @ flatten(vector), vector)

    def exact(self, damping: float = 0.0) -> Tensor:
        return torch.linalg.solve(self.matrix + damping * torch.eye(SIZE), flatten(self.right))

    def residual(self, value: Tensors, damping: float = 0.0) -> float:
        b = flatten(self.right)
        return float((b - self.matrix @ flatten(value) - damping * flatten(value)).norm() / b.norm())


EXACT: dict[str, Callable[[float], linear.LinearSolver]] = {
    "conjugate_gradient": lambda damping: linear.ConjugateGradient(iterations=200, rtol=1e-12, damping=damping),
    "preconditioned": lambda damping: linear.ConjugateGradient(
        iterations=200, rtol=1e-12, damping=damping, preconditioner=linear.NystromPreconditioner(rank=3)
    ),
    "minres": lambda damping: linear.MINRES(iterations=200, rtol=1e-12, damping=damping),
    "neumann": lambda damping: linear.Neumann(iterations=2_000, rtol=1e-12, damping=damping),
    "dense": lambda damping: linear.Dense(damping=damping),
}

SOLVERS = {name: make(0.0) for name, make in EXACT.items()}
SOLVERS |= {"identity": linear.Identity(), "nystrom": linear.Nystrom(rank=5)}


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("name", EXACT)
@drawn(20)
@given(seed=seeds, condition=st.floats(1, 20), damping=st.one_of(st.just(0.0), st.floats(0.01, 5)))
def test_solutions_match_a_factorisation(name: str, warm: bool, seed: int, condition: float, damping: float) -> None:
    system = System.definite(seed, condition)
    solution = system.solve(EXACT[name](damping), warm=warm)
    assert distance(flatten(solution.value), system.exact(damping)) < 1e-9
    assert solution.converged is True
    assert solution.products == system.products
    assert solution.remark == ""
    low, high = solution.curvature
    assert 1 + damping - 1e-6 <= low <= high <= condition + damping + 1e-6
    # The recurrence's residual drifts from the true one by rounding only.
    assert abs(solution.residual - system.residual(solution.value, damping)) < 1e-11


@drawn(20)
@given(seed=seeds, iterations=st.integers(1, 6), warm=st.booleans())
@pytest.mark.parametrize("method", [linear.ConjugateGradient, linear.MINRES])
def test_krylov_methods_report_the_true_residual(method: Any, seed: int, iterations: int, warm: bool) -> None:
    system = System.definite(seed, 100.0)
    solver = method(iterations=iterations, rtol=0.0)
    solution = system.solve(solver, warm=warm)
    assert solution.residual == pytest.approx(system.residual(solution.value), rel=1e-9)
    assert solution.converged is False
    assert solution.iterations == iterations
    assert solution.products == system.products == iterations + warm


@drawn(20)
@given(seed=seeds, iterations=st.integers(1, 6))
def test_conjugate_gradients_minimise_the_energy_over_the_krylov_space(seed: int, iterations: int) -> None:
    """The property holds for each iterate, not only for the last one."""
    system = System.definite(seed, 30.0)
    solution = system.solve(linear.ConjugateGradient(iterations=iterations, rtol=0.0))
    powers = [flatten(system.right)]
    for _ in range(iterations - 1):
        powers.append(system.matrix @ powers[-1])
    space = torch.linalg.qr(torch.stack(powers, dim=1)).Q
    best = space @ torch.linalg.solve(space.T @ system.matrix @ space, space.T @ flatten(system.right))
    assert distance(flatten(solution.value), best) < 1e-7


@drawn(20)
@given(seed=seeds, rtol=st.floats(1e-6, 0.5))
def test_a_tolerance_stops_at_the_first_iterate_below_it(seed: int, rtol: float) -> None:
    system = System.definite(seed, 10.0)
    solution = system.solve(linear.ConjugateGradient(iterations=100, rtol=rtol))
    assert solution.converged is True
    assert solution.residual <= rtol
    if solution.iterations > 1:
        shorter = linear.ConjugateGradient(iterations=solution.iterations - 1, rtol=rtol)
        assert system.solve(shorter).residual > rtol


@pytest.mark.parametrize("name", ["conjugate_gradient", "preconditioned", "minres"])
def test_a_start_at_the_solution_takes_no_iteration(name: str) -> None:
    system = System.definite(1, 10.0)
    start = unflatten(system.exact(), system.right)
    solution = EXACT[name](0.0).solve(system.matvec, system.right, initial=start)
    assert solution.iterations == 0
    assert solution.converged is True
    assert solution.products == system.products == 1


@drawn(20)
@given(seed=seeds, terms=st.integers(1, 8), damping=st.sampled_from([0.0, 0.7]), warm=st.booleans())
def test_neumann_is_richardsons_iteration(seed: int, terms: int, damping: float, warm: bool) -> None:
    system, alpha = System.definite(seed, 5.0), 0.1
    solver = linear.Neumann(iterations=terms, step_size=alpha, damping=damping)
    solution = system.solve(solver, warm=warm)
    matrix, b = system.matrix + damping * torch.eye(SIZE), flatten(system.right)
    iterates = [flatten(system.start) if warm else torch.zeros(SIZE)]
    # From zero, the first update needs no product.
    for _ in range(terms if warm else terms + 1):
        iterates.append(iterates[-1] + alpha * (b - matrix @ iterates[-1]))
    assert distance(flatten(solution.value), iterates[-1]) < 1e-12
    # As documented, the residual is that of the sum without its last term; the true one is smaller.
    assert solution.residual == pytest.approx(system.residual((iterates[-2],), damping), rel=1e-9)
    assert system.residual(solution.value, damping) < solution.residual
    assert solution.products == system.products == terms


@drawn(20)
@given(seed=seeds, condition=st.floats(1, 1e3), scale=st.floats(1e-6, 1e6))
def test_neumann_chooses_a_step_size_that_converges(seed: int, condition: float, scale: float) -> None:
    system = System(seed, scale * condition ** torch.linspace(0, 1, SIZE))
    solution = system.solve(linear.Neumann(iterations=200))
    assert solution.residual < 1
    assert solution.remark == ""
    assert solution.products == system.products == 210


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_series_far_beyond_rounding_measures_no_curvature_there(dtype: torch.dtype) -> None:
    basis = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    matrix = (basis * torch.linspace(0.5, 1.0, 6, dtype=torch.float64) @ basis.T).to(dtype)
    solver = linear.Neumann(iterations=5_000, step_size=0.9)
    solution = solver.solve(lambda v: (matrix @ v[0],), (torch.ones(6, dtype=dtype),))
    assert solution.curvature is not None
    # The curvature along a vector is between the eigenvalues; each step is known to rounding.
    assert 0.5 * (1 - 1e-5) <= solution.curvature[0] <= solution.curvature[1] <= 1 + 1e-5
    assert solution.remark == ""


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("warm", [False, True])
def test_a_zero_right_hand_side_needs_no_product(solver: linear.LinearSolver, warm: bool) -> None:
    system = System.definite(0, 3.0)
    zero = tuple(torch.zeros(shape) for shape in SHAPES)
    solution = solver.solve(system.matvec, zero, initial=system.start if warm else None)
    assert all(not x.any() for x in solution.value)
    assert system.products == 0
    # The identity measures nothing: the host does not wait for a device.
    measured = not isinstance(solver, linear.Identity)
    assert solution.converged is (True if measured else None)
    assert solution.residual == (0.0 if measured else None)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("name", EXACT)
def test_solvers_do_not_modify_their_arguments(name: str, warm: bool) -> None:
    """The product returns its argument itself: a solver that writes to either would fail here."""
    system = System.definite(0, 3.0)
    start = system.start if warm else None
    before = flatten(system.right), flatten(system.start)
    solution = EXACT[name](0.5).solve(lambda vector: vector, system.right, initial=start)
    assert distance(flatten(solution.value), flatten(system.right) / 1.5) < 1e-10
    assert torch.equal(flatten(system.right), before[0])
    assert torch.equal(flatten(system.start), before[1])
    kept = EXACT[name](0.0).solve(lambda vector: vector, system.right, initial=start)
    assert distance(flatten(kept.value), flatten(system.right)) < 1e-10
    assert torch.equal(flatten(system.right), before[0])
    owned = {x.data_ptr() for x in (*system.right, *system.start)}
    assert not owned & {x.data_ptr() for x in kept.value}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", EXACT)
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    """Accurate to a few roundings, for a right-hand side whose squares underflow in half precision."""
    system = System.definite(0, 3.0)
    matrix, small = system.matrix.to(dtype), 1e-3
    right = tuple((small * x).to(dtype) for x in system.right)
    solution = EXACT[name](0.0).solve(lambda v: unflatten(matrix @ flatten(v), v), right)
    assert {x.dtype for x in solution.value} == {dtype}
    expected = torch.linalg.solve(matrix.double(), flatten(right).double())
    assert distance(flatten(solution.value).double(), expected) < 30 * torch.finfo(dtype).eps
    assert "curvature" not in solution.remark


@pytest.mark.parametrize("name", ["conjugate_gradient", "preconditioned", "minres"])
@pytest.mark.parametrize("condition", [2.0, 1e2, 1e4])
@drawn(10)
@given(seed=seeds)
def test_a_tolerance_below_rounding_stops_at_rounding_with_a_remark(name: str, condition: float, seed: int) -> None:
    system = System.definite(seed, condition)
    matrix, right = system.matrix.float(), tuple(x.float() for x in system.right)
    calls = itertools.count(1)

    def matvec(vector: Tensors) -> Tensors:
        next(calls)
        return unflatten(matrix @ flatten(vector), vector)

    solution = EXACT[name](0.0).solve(matvec, right)
    assert solution.residual < 1e-6
    assert solution.converged is True
    assert solution.remark.startswith("the residual reached rounding error (")
    assert "rtol=1e-12" in solution.remark
    assert solution.products == next(calls) - 1
    assert solution.products < 80


def test_a_distant_start_stops_at_its_own_rounding() -> None:
    """The residual of a start of 1e20 is known to 1e4 at best: the solver must not report convergence."""
    system = System.definite(0, 3.0)
    start = tuple(1e20 * x for x in system.start)
    for name in ("conjugate_gradient", "preconditioned", "minres"):
        solution = EXACT[name](0.0).solve(system.matvec, system.right, initial=start)
        assert solution.converged is False
        assert solution.remark.startswith("the residual reached rounding error (")


def test_the_identity_measures_nothing() -> None:
    system = System.definite(0, 3.0)
    solution = system.solve(linear.Identity())
    assert all(map(torch.equal, solution.value, system.right))
    assert (solution.residual, solution.converged, solution.products, system.products) == (None, None, 0, 0)
    scaled = system.solve(linear.Identity(scale=0.3))
    assert all(map(torch.equal, scaled.value, (0.3 * b for b in system.right)))


@drawn(20)
@given(seed=seeds, negative=st.integers(1, SIZE - 1))
def test_indefinite_matrices_are_reported(seed: int, negative: int) -> None:
    system = System.indefinite(seed, negative)
    solution = system.solve(linear.ConjugateGradient(iterations=500, rtol=1e-13))
    # It met a negative direction and kept a finite iterate, or it converged first.
    assert solution.converged or solution.remark.startswith("negative curvature -")
    assert solution.residual == pytest.approx(system.residual(solution.value), rel=1e-5, abs=1e-8)
    dense = system.solve(linear.Dense())
    assert distance(flatten(dense.value), system.exact()) < 1e-9
    assert dense.curvature == pytest.approx((-1 - 2 * (negative - 1) / (SIZE - 1), 3))
    assert dense.remark.startswith("negative curvature -")
    series = system.solve(linear.Neumann(iterations=2_000, step_size=0.3))
    assert series.converged is False
    assert "does not converge" in series.remark
    assert series.iterations < 2_000


@pytest.mark.parametrize("name", ["conjugate_gradient", "dense", "gmres", "minres", "neumann"])
@pytest.mark.parametrize(("dtype", "exponent"), [(torch.float32, -90), (torch.float64, -600)])
def test_a_right_hand_side_whose_square_has_no_number_is_solved(name: str, dtype: torch.dtype, exponent: int) -> None:
    """A cotangent whose squares vanish is not zero. The matrix has integers, so that a power of two changes no digit."""
    solvers: dict[str, linear.LinearSolver] = {
        "conjugate_gradient": linear.ConjugateGradient(iterations=2),
        "dense": linear.Dense(),
        "gmres": linear.GMRES(iterations=2),
        "minres": linear.MINRES(iterations=2),
        "neumann": linear.Neumann(iterations=60, step_size=0.25),
    }
    matrix, right = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=dtype), torch.tensor([1.0, 2.0], dtype=dtype)
    plain, scaled = (solvers[name].solve(lambda v: (matrix @ v[0],), (right * 2.0**k,)) for k in (0, exponent))
    exact = torch.tensor([1.0, 7.0], dtype=dtype) / 11
    assert distance(scaled.value[0] * 2.0**-exponent, exact) < 1e-5
    assert scaled.converged == plain.converged
    assert scaled.products > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_nonfinite_right_hand_side_raises(solver: linear.LinearSolver, bad: float) -> None:
    system = System.definite(0, 3.0)
    right = (system.right[0], torch.tensor(bad), *system.right[2:])
    with pytest.raises(mlopt.NonFiniteError, match="right-hand side"):
        solver.solve(system.matvec, right)
    assert system.products == 0


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "identity"])
@pytest.mark.parametrize("late", [False, True])
def test_a_nonfinite_product_raises(name: str, late: bool) -> None:
    system = System.definite(0, 3.0)
    calls = itertools.count()

    def matvec(vector: Tensors) -> Tensors:
        broken = next(calls) >= (2 if late else 0)
        return tuple(x * math.nan for x in vector) if broken else system.matvec(vector)

    with pytest.raises(mlopt.NonFiniteError, match="not finite"):
        SOLVERS[name].solve(matvec, system.right)


def test_dense_solves_a_singular_matrix_in_its_range_with_a_remark() -> None:
    """The least-norm solution: zero where the matrix is zero, exact elsewhere."""
    right = (torch.tensor([3.0, 5.0]),)
    solution = linear.Dense().solve(lambda v: (v[0] * torch.tensor([2.0, 0.0]),), right)
    assert torch.allclose(solution.value[0], torch.tensor([1.5, 0.0]))
    assert "singular" in solution.remark
    assert solution.converged is False
    assert solution.residual == pytest.approx(5 / 34**0.5)


@pytest.mark.parametrize("seed", range(20))
def test_dense_solves_a_matrix_that_is_singular_up_to_rounding_by_its_pseudo_inverse(seed: int) -> None:
    rows, right = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix, vector = rows[:4].T @ rows[:4], right[0]
    solution = linear.Dense().solve(lambda v: (matrix @ v[0],), (vector,))
    expected = torch.linalg.pinv(matrix, rtol=1e-9) @ vector
    assert torch.allclose(solution.value[0], expected, rtol=1e-6, atol=1e-9)  # the rounding of a condition of 1e3
    assert "singular" in solution.remark
    assert solution.converged is False


def test_dense_refuses_more_unknowns_than_its_limit() -> None:
    system = System.definite(0, 3.0)
    with pytest.raises(mlopt.EstimatorError, match=r"the level has 10 unknowns and limit=9; use ConjugateGradient"):
        system.solve(linear.Dense(limit=9))
    assert system.solve(linear.Dense(limit=10)).iterations == 10


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: linear.ConjugateGradient(iterations=0), r"iterations=0; it must be a whole number >= 1"),
        (lambda: linear.ConjugateGradient(iterations=2.0), r"iterations=2.0; it must be a whole number >= 1"),
        (lambda: linear.ConjugateGradient(rtol=-1.0), r"rtol=-1.0; it must be a finite number >= 0"),
        (
            lambda: linear.ConjugateGradient(negative_curvature="go"),
            r"='go'; it must be one of 'stop', 'raise', 'continue'",
        ),
        (lambda: linear.MINRES(iterations=0), r"iterations=0; it must be a whole number >= 1"),
        (lambda: linear.Identity(scale=-0.1), r"scale=-0.1; it must be a finite number >= 0"),
        (lambda: linear.Nystrom(rank=0), r"rank=0; it must be a whole number >= 1"),
        (lambda: linear.Nystrom(damping=0.0), r"damping=0.0; it must be a finite number > 0"),
        (lambda: linear.NystromPreconditioner(rank=1.5), r"rank=1.5; it must be a whole number >= 1"),
        (lambda: linear.Neumann(iterations=True), r"iterations=True; it must be a whole number >= 1"),
        (lambda: linear.Neumann(step_size=0.0), r"step_size=0.0; it must be a finite number > 0, or None"),
        (lambda: linear.Dense(damping=math.nan), r"damping=nan; it must be a finite number >= 0"),
        (lambda: mlopt.Dense(products="reverse"), r"products='reverse'; it must be one of 'autograd', 'forward', "),
    ],
)
def test_arguments_are_checked(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()
