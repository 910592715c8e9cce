"""Solvers of A x = b, each against a factorisation of A."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

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
    """A x = b with a drawn symmetric A, in tensors of several shapes; it counts the products."""

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
    "neumann": lambda damping: linear.Neumann(terms=2_000, rtol=1e-12, damping=damping),
    "dense": lambda damping: linear.Dense(damping=damping),
}


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("name", EXACT)
@drawn(20)
@given(seed=seeds, condition=st.floats(1, 20), damping=st.one_of(st.just(0.0), st.floats(0.01, 5)))
def test_against_a_factorisation(name: str, warm: bool, seed: int, condition: float, damping: float) -> None:
    system = System.definite(seed, condition)
    found = EXACT[name](damping).solve(system.matvec, system.right, initial=system.start if warm else None)
    assert distance(flatten(found.value), system.exact(damping)) < 1e-9
    assert found.converged is True
    assert found.products == system.products
    assert found.remark == ""
    low, high = found.curvature
    assert 1 + damping - 1e-6 <= low <= high <= condition + damping + 1e-6
    # The recurrence's residual drifts from the true one by rounding only.
    assert abs(found.residual - system.residual(found.value, damping)) < 1e-11


@drawn(20)
@given(seed=seeds, iterations=st.integers(1, 6), warm=st.booleans())
def test_conjugate_gradients_report_the_true_residual(seed: int, iterations: int, warm: bool) -> None:
    system = System.definite(seed, 100.0)
    solver = linear.ConjugateGradient(iterations=iterations, rtol=0.0)
    found = solver.solve(system.matvec, system.right, initial=system.start if warm else None)
    assert found.residual == pytest.approx(system.residual(found.value), rel=1e-9)
    assert found.converged is False
    assert found.iterations == iterations
    assert found.products == system.products == iterations + warm


@drawn(20)
@given(seed=seeds, iterations=st.integers(1, 6))
def test_conjugate_gradients_minimise_the_energy_over_the_krylov_space(seed: int, iterations: int) -> None:
    """So that each iterate, not the last alone, is what the method promises."""
    system = System.definite(seed, 30.0)
    found = linear.ConjugateGradient(iterations=iterations, rtol=0.0).solve(system.matvec, system.right)
    powers = [flatten(system.right)]
    for _ in range(iterations - 1):
        powers.append(system.matrix @ powers[-1])
    space = torch.linalg.qr(torch.stack(powers, dim=1)).Q
    best = space @ torch.linalg.solve(space.T @ system.matrix @ space, space.T @ flatten(system.right))
    assert distance(flatten(found.value), best) < 1e-7


@drawn(20)
@given(seed=seeds, rtol=st.floats(1e-6, 0.5))
def test_a_tolerance_stops_at_the_first_iterate_below_it(seed: int, rtol: float) -> None:
    system = System.definite(seed, 10.0)
    found = linear.ConjugateGradient(iterations=100, rtol=rtol).solve(system.matvec, system.right)
    assert found.converged is True
    assert found.residual <= rtol
    if found.iterations > 1:
        shorter = linear.ConjugateGradient(iterations=found.iterations - 1, rtol=rtol)
        assert shorter.solve(system.matvec, system.right).residual > rtol


def test_a_start_at_the_solution_takes_no_iteration() -> None:
    system = System.definite(1, 10.0)
    start = unflatten(system.exact(), system.right)
    found = linear.ConjugateGradient(rtol=1e-8).solve(system.matvec, system.right, initial=start)
    assert found.iterations == 0
    assert found.converged is True
    assert found.products == system.products == 1


@drawn(20)
@given(seed=seeds, terms=st.integers(1, 8), damping=st.sampled_from([0.0, 0.7]), warm=st.booleans())
def test_a_series_is_richardsons_iteration(seed: int, terms: int, damping: float, warm: bool) -> None:
    system, alpha = System.definite(seed, 5.0), 0.1
    solver = linear.Neumann(terms=terms, step_size=alpha, damping=damping)
    found = solver.solve(system.matvec, system.right, initial=system.start if warm else None)
    matrix, b = system.matrix + damping * torch.eye(SIZE), flatten(system.right)
    iterates = [flatten(system.start) if warm else torch.zeros(SIZE)]
    # From zero, the first update needs no product.
    for _ in range(terms if warm else terms + 1):
        iterates.append(iterates[-1] + alpha * (b - matrix @ iterates[-1]))
    assert distance(flatten(found.value), iterates[-1]) < 1e-12
    # The residual is that of the sum before its last term, as documented; the true one is smaller.
    assert found.residual == pytest.approx(system.residual((iterates[-2],), damping), rel=1e-9)
    assert system.residual(found.value, damping) < found.residual
    assert found.products == system.products == terms


@drawn(20)
@given(seed=seeds, condition=st.floats(1, 1e3), scale=st.floats(1e-6, 1e6))
def test_a_series_finds_a_step_size_that_converges(seed: int, condition: float, scale: float) -> None:
    system = System(seed, scale * condition ** torch.linspace(0, 1, SIZE))
    found = linear.Neumann(terms=200).solve(system.matvec, system.right)
    assert found.residual < 1
    assert found.remark == ""
    assert found.products == system.products == 210


@pytest.mark.parametrize(
    "solver", [*(make(0.0) for make in EXACT.values()), linear.Identity()], ids=[*EXACT, "identity"]
)
@pytest.mark.parametrize("warm", [False, True])
def test_zero_in_zero_out_at_no_product(solver: linear.LinearSolver, warm: bool) -> None:
    system = System.definite(0, 3.0)
    zero = tuple(torch.zeros(shape) for shape in SHAPES)
    found = solver.solve(system.matvec, zero, initial=system.start if warm else None)
    assert all(not x.any() for x in found.value)
    assert system.products == 0
    assert found.converged is True
    assert found.residual == 0.0


def test_the_identity_spends_nothing_and_claims_nothing() -> None:
    system = System.definite(0, 3.0)
    found = linear.Identity().solve(system.matvec, system.right)
    assert all(map(torch.equal, found.value, system.right))
    assert (found.residual, found.converged, found.products, system.products) == (None, None, 0, 0)


@drawn(20)
@given(seed=seeds, negative=st.integers(1, SIZE - 1))
def test_indefinite_matrices(seed: int, negative: int) -> None:
    eigenvalues = torch.linspace(1, 3, SIZE)
    eigenvalues[:negative] *= -1
    system = System(seed, eigenvalues)
    found = linear.ConjugateGradient(iterations=500, rtol=1e-13).solve(system.matvec, system.right)
    # It either met a negative direction and kept a finite iterate, or was done before it could.
    assert found.converged or found.remark.startswith("negative curvature -")
    assert found.residual == pytest.approx(system.residual(found.value), rel=1e-5, abs=1e-8)
    dense = linear.Dense().solve(system.matvec, system.right)
    assert distance(flatten(dense.value), system.exact()) < 1e-9
    assert dense.curvature == pytest.approx((float(eigenvalues.min()), float(eigenvalues.max())))
    assert dense.remark.startswith("negative curvature -")
    series = linear.Neumann(terms=2_000, step_size=0.3).solve(system.matvec, system.right)
    assert series.converged is False
    assert "does not converge" in series.remark
    assert series.iterations < 2_000


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "solver", [*(make(0.0) for make in EXACT.values()), linear.Identity()], ids=[*EXACT, "identity"]
)
def test_a_right_hand_side_that_is_not_finite_raises(solver: linear.LinearSolver, bad: float) -> None:
    system = System.definite(0, 3.0)
    right = (system.right[0], torch.tensor(bad), *system.right[2:])
    with pytest.raises(mlopt.NonFiniteError, match="right-hand side"):
        solver.solve(system.matvec, right)
    assert system.products == 0


@pytest.mark.parametrize("name", ["conjugate_gradient", "neumann", "dense"])
@pytest.mark.parametrize("late", [False, True])
def test_a_product_that_is_not_finite_raises(name: str, late: bool) -> None:
    system = System.definite(0, 3.0)
    calls = itertools.count()

    def matvec(vector: Tensors) -> Tensors:
        broken = next(calls) >= (2 if late else 0)
        return tuple(x * math.nan for x in vector) if broken else system.matvec(vector)

    with pytest.raises(mlopt.NonFiniteError, match="not finite"):
        EXACT[name](0.0).solve(matvec, system.right)


def test_a_singular_matrix_is_solved_in_its_range_and_said() -> None:
    """Least norm: zero where the matrix is zero, exact elsewhere."""
    right = (torch.tensor([3.0, 5.0]),)
    found = linear.Dense().solve(lambda v: (v[0] * torch.tensor([2.0, 0.0]),), right)
    assert torch.allclose(found.value[0], torch.tensor([1.5, 0.0]))
    assert "singular" in found.remark
    assert found.converged is False
    assert found.residual == pytest.approx(5 / 34**0.5)


def test_dense_refuses_what_is_too_large() -> None:
    system = System.definite(0, 3.0)
    with pytest.raises(mlopt.EstimatorError, match=r"the level has 10 unknowns and limit=9; use ConjugateGradient"):
        linear.Dense(limit=9).solve(system.matvec, system.right)
    assert linear.Dense(limit=10).solve(system.matvec, system.right).iterations == 10


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: linear.ConjugateGradient(iterations=0), r"iterations=0; it must be a whole number >= 1"),
        (lambda: linear.ConjugateGradient(iterations=2.0), r"iterations=2.0; it must be a whole number >= 1"),
        (lambda: linear.ConjugateGradient(rtol=-1.0), r"rtol=-1.0; it must be a finite number >= 0"),
        (lambda: linear.Neumann(terms=True), r"terms=True; it must be a whole number >= 1"),
        (lambda: linear.Neumann(step_size=0.0), r"step_size=0.0; it must be a finite number > 0, or None"),
        (lambda: linear.Dense(damping=math.nan), r"damping=nan; it must be a finite number >= 0"),
        (lambda: mlopt.Dense(products="reverse"), r"products='reverse'; it must be one of 'autograd', 'forward', "),
    ],
)
def test_arguments_are_checked(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_streaming_needs_the_identity() -> None:
    with pytest.raises(mlopt.EstimatorError, match="streamed=True with Dense"):
        mlopt.Implicit(solver=linear.Dense(), streamed=True)
