"""The Nystrom approximation: against its formula, its error bound, and what it saves conjugate gradients."""

from __future__ import annotations

import math

import pytest
import torch
from core_cases import distance, drawn, seeds
from hypothesis import given
from hypothesis import strategies as st
from test_linear import SHAPES, SIZE, System
from torch import Tensor

import mlopt
from mlopt import linear
from mlopt.tensors import Tensors, axpy, flatten, scale, unflatten

dampings = st.floats(1e-3, 10.0)


def operator(matrix: Tensor) -> linear.MatVec:
    return lambda vector: unflatten(matrix @ flatten(vector), vector)


def random_matrix(seed: int, eigenvalues: Tensor) -> Tensor:
    n = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed))).Q
    return (basis * eigenvalues) @ basis.T


def as_matrix(solver: linear.Nystrom, matrix: Tensor) -> Tensor:
    """Return the solver's inverse, written out by solving for every unit vector."""
    units = torch.eye(len(matrix))
    return torch.stack([solver.solve(operator(matrix), (unit,)).value[0] for unit in units], dim=1)


@drawn(20)
@given(seed=seeds, condition=st.floats(1, 100), damping=dampings, rank=st.integers(SIZE, 2 * SIZE), warm=st.booleans())
def test_exact_at_full_rank(seed: int, condition: float, damping: float, rank: int, warm: bool) -> None:
    system = System.definite(seed, condition)
    solver = linear.Nystrom(rank=rank, damping=damping)
    found = solver.solve(system.matvec, system.right, initial=system.start if warm else None)
    assert distance(flatten(found.value), system.exact(damping)) < 1e-9
    assert found.residual == pytest.approx(system.residual(found.value, damping), abs=1e-12)
    assert (found.converged, found.remark, found.iterations) == (True, "", 0)
    assert found.products == system.products == SIZE + 1
    assert found.curvature == pytest.approx((1 + damping, condition + damping))


@drawn(20)
@given(seed=seeds, rank=st.integers(1, SIZE - 1), spare=st.integers(0, 3), damping=dampings)
def test_exact_where_the_matrix_has_no_larger_rank(seed: int, rank: int, spare: int, damping: float) -> None:
    eigenvalues = torch.zeros(SIZE)
    eigenvalues[:rank] = torch.linspace(1, 7, rank)
    system = System(seed, eigenvalues)
    found = linear.Nystrom(rank=rank + spare, damping=damping).solve(system.matvec, system.right)
    assert distance(flatten(found.value), system.exact(damping)) < 1e-8
    assert found.converged is True
    assert found.remark == ""


@drawn(20)
@given(seed=seeds, rank=st.integers(1, SIZE), damping=dampings)
def test_it_is_its_formula(seed: int, rank: int, damping: float) -> None:
    """With the images of the probes that it asks for: (A O) (O^T A O)^-1 (A O)^T + damping I, inverted."""
    system = System.definite(seed, 30.0)
    asked: list[Tensor] = []

    def matvec(vector: Tensors) -> Tensors:
        asked.append(flatten(vector))
        return system.matvec(vector)

    found = linear.Nystrom(rank=rank, damping=damping, seed=seed).solve(matvec, system.right)
    probes = torch.stack(asked[:-1], dim=1)
    assert torch.allclose(probes.T @ probes, torch.eye(rank))
    images = system.matrix @ probes
    approximation = images @ torch.linalg.solve(probes.T @ images, images.T)
    expected = torch.linalg.solve(approximation + damping * torch.eye(SIZE), flatten(system.right))
    assert distance(flatten(found.value), expected) < 1e-7
    assert found.residual == pytest.approx(system.residual(found.value, damping), rel=1e-9, abs=1e-12)


@drawn(10)
@given(seed=seeds, decay=st.floats(0.3, 0.7), damping=st.floats(1e-2, 1.0))
def test_the_error_falls_with_the_spectrum(seed: int, decay: float, damping: float) -> None:
    """Frangella et al., proposition 2.2: the error's expectation is bounded by the eigenvalues left out; ten times it."""
    n, rank, oversampled = 40, 12, 4
    eigenvalues = decay ** torch.arange(n, dtype=torch.float64)
    matrix = random_matrix(seed, eigenvalues)
    found = as_matrix(linear.Nystrom(rank=rank, damping=damping, seed=seed), matrix)
    approximation = torch.linalg.inv(found) - damping * torch.eye(n)
    error = torch.linalg.matrix_norm(matrix - approximation, ord=2)
    p = rank - oversampled
    bound = (1 + 2 * p / (oversampled - 1)) * eigenvalues[p] + 2 * math.e**2 * rank / (
        oversampled**2 - 1
    ) * eigenvalues[p:].sum()
    assert error < 10 * bound
    assert error < 0.2
    # From below: what is left over is positive semi-definite.
    assert torch.linalg.eigvalsh(matrix - approximation)[0] > -1e-9


@drawn(20)
@given(seed=seeds, negative=st.integers(1, SIZE - 1), damping=dampings)
def test_negative_curvature_is_taken_for_zero_and_said(seed: int, negative: int, damping: float) -> None:
    eigenvalues = torch.linspace(1, 3, SIZE)
    eigenvalues[:negative] *= -1
    system = System(seed, eigenvalues)
    found = linear.Nystrom(rank=SIZE, damping=damping).solve(system.matvec, system.right)
    values, vectors = torch.linalg.eigh(system.matrix)
    clipped = (vectors * values.clamp(min=0)) @ vectors.T + damping * torch.eye(SIZE)
    assert distance(flatten(found.value), torch.linalg.solve(clipped, flatten(system.right))) < 1e-8
    low = float(eigenvalues.min()) + damping
    assert f"negative curvature {low:.3g} taken to be zero" in found.remark
    assert found.residual == pytest.approx(system.residual(found.value, damping), rel=1e-9)
    assert found.converged is False


def test_eigenvalues_left_out_that_exceed_the_damping_are_said() -> None:
    system = System.definite(0, 3.0)
    found = linear.Nystrom(rank=2, damping=1e-3).solve(system.matvec, system.right)
    assert found.residual > 100
    assert found.converged is False
    assert found.remark.startswith("worse than no solve: eigenvalues that 2 products missed exceed the damping")


@pytest.mark.parametrize("eigenvalue", [1.0, -1.0])
@drawn(10)
@given(seed=seeds, a=st.floats(-3, 3), b=st.floats(-3, 3), rank=st.integers(1, 6))
def test_it_is_linear_in_the_right_hand_side(eigenvalue: float, seed: int, a: float, b: float, rank: int) -> None:
    eigenvalues = torch.linspace(1, 9, SIZE)
    eigenvalues[0] = eigenvalue
    system = System(seed, eigenvalues)
    solver = linear.Nystrom(rank=rank, damping=0.5)
    both = axpy(b, system.start, scale(a, system.right))
    one, two, three = (flatten(solver.solve(system.matvec, v).value) for v in (system.right, system.start, both))
    assert torch.linalg.vector_norm(three - a * one - b * two) <= 1e-12 * (1 + one.norm() + two.norm())


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: linear.Nystrom(rank=2, seed=seed),
        lambda seed: linear.ConjugateGradient(
            iterations=2, preconditioner=linear.NystromPreconditioner(rank=2, seed=seed)
        ),
    ],
    ids=["alone", "preconditioner"],
)
def test_the_probes_are_the_solvers_own(make: type[linear.LinearSolver]) -> None:
    system = System.definite(0, 30.0)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = make(0).solve(system.matvec, system.right)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = make(0).solve(system.matvec, system.right), make(1).solve(system.matvec, system.right)
    assert torch.equal(flatten(first.value), flatten(again.value))
    assert distance(flatten(other.value), flatten(first.value)) > 1e-6


def test_zero_in_zero_out_at_no_product() -> None:
    system = System.definite(0, 3.0)
    zero = tuple(torch.zeros(shape) for shape in SHAPES)
    for solver in (linear.Nystrom(), linear.ConjugateGradient(preconditioner=linear.NystromPreconditioner())):
        found = solver.solve(system.matvec, zero, initial=system.start)
        assert not flatten(found.value).any()
        assert (found.converged, found.residual, found.products, system.products) == (True, 0.0, 0, 0)


@pytest.mark.parametrize("late", [0, 2])
def test_a_product_that_is_not_finite_raises(late: int) -> None:
    system = System.definite(0, 3.0)

    def matvec(vector: Tensors) -> Tensors:
        product = system.matvec(vector)
        return tuple(x * math.nan for x in product) if system.products > late else product

    with pytest.raises(mlopt.NonFiniteError, match="a product with the Hessian is not finite"):
        linear.Nystrom(rank=5).solve(matvec, system.right)


def test_a_matrix_of_zeros_leaves_the_damping() -> None:
    right = (torch.ones(3),)
    found = linear.Nystrom(rank=2, damping=0.5).solve(lambda v: (0 * v[0],), right)
    assert torch.allclose(found.value[0], torch.full((3,), 2.0))
    solver = linear.ConjugateGradient(damping=0.5, preconditioner=linear.NystromPreconditioner(rank=2))
    assert torch.allclose(solver.solve(lambda v: (0 * v[0],), right).value[0], torch.full((3,), 2.0))


@pytest.mark.parametrize(("dtype", "epsilons"), [(torch.float32, 100), (torch.bfloat16, 2), (torch.float16, 2)])
def test_other_precisions(dtype: torch.dtype, epsilons: int) -> None:
    """Three factorisations in float32 lose tens of its epsilons; the half precisions round only the probes and the result."""
    system = System.definite(0, 3.0)
    matrix, right = system.matrix.to(dtype), tuple((1e-3 * x).to(dtype) for x in system.right)
    found = linear.Nystrom(rank=SIZE, damping=1.0).solve(operator(matrix), right)
    assert {x.dtype for x in found.value} == {dtype}
    expected = torch.linalg.solve(matrix.double() + torch.eye(SIZE), flatten(right).double())
    assert distance(flatten(found.value).double(), expected) < epsilons * torch.finfo(dtype).eps


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@drawn(10)
@given(seed=seeds)
def test_conjugate_gradients_take_fewer_iterations_with_it(dtype: torch.dtype, damping: float, seed: int) -> None:
    """A few large eigenvalues above a bulk: half the iterations and less, and fewer products with the probes' in."""
    n = 100
    eigenvalues = torch.linspace(1, 2, n)
    eigenvalues[:5] = 10 ** torch.linspace(3, 5, 5)
    matrix = random_matrix(seed, eigenvalues)
    right = torch.randn(n, generator=torch.Generator().manual_seed(seed + 1))
    solutions = []
    for preconditioner in (None, linear.NystromPreconditioner(rank=8)):
        solver = linear.ConjugateGradient(
            iterations=100, rtol=1e-6, damping=damping, preconditioner=preconditioner, negative_curvature="raise"
        )
        solutions.append(solver.solve(operator(matrix.to(dtype)), (right.to(dtype),)))
    plain, helped = solutions
    assert plain.converged is helped.converged is True
    assert helped.products == helped.iterations + 8
    assert 2 * helped.iterations <= plain.iterations
    if dtype == torch.float64:
        assert distance(helped.value[0], torch.linalg.solve(matrix + damping * torch.eye(n), right)) < 1e-4


@drawn(10)
@given(seed=seeds, condition=st.floats(2, 100), damping=st.sampled_from([0.0, 0.5]))
def test_a_full_preconditioner_leaves_one_iteration(seed: int, condition: float, damping: float) -> None:
    system = System.definite(seed, condition)
    solver = linear.ConjugateGradient(
        rtol=1e-9, damping=damping, preconditioner=linear.NystromPreconditioner(rank=SIZE)
    )
    found = solver.solve(system.matvec, system.right)
    assert (found.iterations, found.products, system.products) == (1, SIZE + 1, SIZE + 1)
    assert distance(flatten(found.value), system.exact(damping)) < 1e-8


def test_a_solve_that_is_done_at_its_start_prepares_nothing() -> None:
    system = System.definite(0, 3.0)
    solver = linear.ConjugateGradient(rtol=1e-8, preconditioner=linear.NystromPreconditioner(rank=5))
    start = unflatten(system.exact(), system.right)
    assert solver.solve(system.matvec, system.right, initial=start).products == system.products == 1
