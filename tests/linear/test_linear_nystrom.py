"""The Nystrom approximation: its formula, its error bound, and the iterations that it saves conjugate gradients."""

from __future__ import annotations

import math
import re

import pytest
import torch
from core_cases import distance, drawn, seeds
from hypothesis import given
from hypothesis import strategies as st
from test_linear import SIZE, System
from torch import Tensor, nn

import mlopt
from benchmarks.hypergrad.measuring import peak_memory
from mlopt import linear
from mlopt.linear.nystrom import _approximate, _orthonormalize
from mlopt.tensors import Tensors, axpy, flatten, scale, unflatten

#: The size of a matrix whose eigenvalues spread over sixteen orders of magnitude.
SPREAD = 40

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
def test_full_rank_is_exact(seed: int, condition: float, damping: float, rank: int, warm: bool) -> None:
    system = System.definite(seed, condition)
    solver = linear.Nystrom(rank=rank, damping=damping)
    solution = system.solve(solver, warm=warm)
    assert distance(flatten(solution.value), system.exact(damping)) < 1e-9
    assert solution.residual == pytest.approx(system.residual(solution.value, damping), abs=1e-12)
    assert (solution.converged, solution.remark, solution.iterations) == (True, "", 0)
    assert solution.products == system.products == SIZE + 1
    assert solution.curvature == pytest.approx((1 + damping, condition + damping))


@drawn(20)
@given(seed=seeds, rank=st.integers(1, SIZE - 1), spare=st.integers(0, 3), damping=dampings)
def test_the_solution_is_exact_if_the_rank_covers_the_matrix(seed: int, rank: int, spare: int, damping: float) -> None:
    eigenvalues = torch.zeros(SIZE)
    eigenvalues[:rank] = torch.linspace(1, 7, rank)
    system = System(seed, eigenvalues)
    solution = system.solve(linear.Nystrom(rank=rank + spare, damping=damping))
    assert distance(flatten(solution.value), system.exact(damping)) < 1e-8
    assert solution.converged is True
    assert solution.remark == ""


@drawn(20)
@given(seed=seeds, rank=st.integers(1, SIZE), damping=dampings)
def test_the_solution_matches_the_formula(seed: int, rank: int, damping: float) -> None:
    """The inverse of (A O) (O^T A O)^-1 (A O)^T + damping I, where O holds the vectors that were multiplied."""
    system = System.definite(seed, 30.0)
    multiplied: list[Tensor] = []

    def matvec(vector: Tensors) -> Tensors:
        multiplied.append(flatten(vector))
        return system.matvec(vector)

    solution = linear.Nystrom(rank=rank, damping=damping, seed=seed).solve(matvec, system.right)
    probes = torch.stack(multiplied[:-1], dim=1)
    assert torch.allclose(probes.T @ probes, torch.eye(rank))
    images = system.matrix @ probes
    approximation = images @ torch.linalg.solve(probes.T @ images, images.T)
    expected = torch.linalg.solve(approximation + damping * torch.eye(SIZE), flatten(system.right))
    assert distance(flatten(solution.value), expected) < 1e-7
    assert solution.residual == pytest.approx(system.residual(solution.value, damping), rel=1e-9, abs=1e-12)


@drawn(10)
@given(seed=seeds, decay=st.floats(0.3, 0.7), damping=st.floats(1e-2, 1.0))
def test_the_error_falls_with_the_spectrum(seed: int, decay: float, damping: float) -> None:
    """Frangella et al., proposition 2.2, bounds the expected error by the omitted eigenvalues; allow ten times that."""
    n, rank, oversampled = 40, 12, 4
    eigenvalues = decay ** torch.arange(n, dtype=torch.float64)
    matrix = random_matrix(seed, eigenvalues)
    inverse = as_matrix(linear.Nystrom(rank=rank, damping=damping, seed=seed), matrix)
    approximation = torch.linalg.inv(inverse) - damping * torch.eye(n)
    error = torch.linalg.matrix_norm(matrix - approximation, ord=2)
    p = rank - oversampled
    bound = (1 + 2 * p / (oversampled - 1)) * eigenvalues[p] + 2 * math.e**2 * rank / (
        oversampled**2 - 1
    ) * eigenvalues[p:].sum()
    assert error < 10 * bound
    assert error < 0.5  # of the largest eigenvalue, which is 1
    # The approximation is from below: the remainder is positive semi-definite.
    assert torch.linalg.eigvalsh(matrix - approximation)[0] > -1e-9


@drawn(20)
@given(seed=seeds, negative=st.integers(1, SIZE - 1), damping=st.floats(1e-3, 0.9))
def test_negative_curvature_counts_as_zero_with_a_remark(seed: int, negative: int, damping: float) -> None:
    """Eigenvalues from -1 down stay negative at these dampings; no residual is below this tolerance by chance."""
    system = System.indefinite(seed, negative)
    solution = system.solve(linear.Nystrom(rank=SIZE, damping=damping, rtol=1e-9))
    values, vectors = torch.linalg.eigh(system.matrix)
    clipped = (vectors * values.clamp(min=0)) @ vectors.T + damping * torch.eye(SIZE)
    assert distance(flatten(solution.value), torch.linalg.solve(clipped, flatten(system.right))) < 1e-8
    remark = re.match(r"negative curvature (\S+) treated as zero", solution.remark)
    assert remark
    assert float(remark[1]) == pytest.approx(float(values[0]), rel=0.01)  # of A itself, printed with three digits
    assert solution.residual == pytest.approx(system.residual(solution.value, damping), rel=1e-9)
    assert solution.converged is False


def test_omitted_eigenvalues_above_the_damping_are_reported() -> None:
    system = System.definite(0, 3.0)
    solution = system.solve(linear.Nystrom(rank=2, damping=1e-3))
    assert solution.residual > 100
    assert solution.converged is False
    assert solution.remark.startswith("worse than no solve: eigenvalues that 2 products missed exceed the damping")


@pytest.mark.parametrize("eigenvalue", [1.0, -1.0])
@drawn(10)
@given(seed=seeds, a=st.floats(-3, 3), b=st.floats(-3, 3), rank=st.integers(1, 6))
def test_the_solution_is_linear_in_the_right_hand_side(
    eigenvalue: float, seed: int, a: float, b: float, rank: int
) -> None:
    eigenvalues = torch.linspace(1, 9, SIZE)
    eigenvalues[0] = eigenvalue
    system = System(seed, eigenvalues)
    solver = linear.Nystrom(rank=rank, damping=0.5)
    both = axpy(b, system.start, scale(a, system.right))
    x, y, sum_ = (flatten(solver.solve(system.matvec, v).value) for v in (system.right, system.start, both))
    assert torch.linalg.vector_norm(sum_ - a * x - b * y) <= 1e-12 * (1 + x.norm() + y.norm())


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
def test_probes_come_from_the_solvers_own_generator(make: type[linear.LinearSolver]) -> None:
    system = System.definite(0, 30.0)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = system.solve(make(0))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = system.solve(make(0)), system.solve(make(1))
    assert torch.equal(flatten(first.value), flatten(again.value))
    assert distance(flatten(other.value), flatten(first.value)) > 1e-6


def test_a_matrix_of_zeros_reduces_to_the_damping() -> None:
    right = (torch.ones(3),)
    solution = linear.Nystrom(rank=2, damping=0.5).solve(lambda v: (0 * v[0],), right)
    assert torch.allclose(solution.value[0], torch.full((3,), 2.0))
    solver = linear.ConjugateGradient(damping=0.5, preconditioner=linear.NystromPreconditioner(rank=2))
    assert torch.allclose(solver.solve(lambda v: (0 * v[0],), right).value[0], torch.full((3,), 2.0))


@pytest.mark.parametrize(("dtype", "epsilons"), [(torch.float32, 100), (torch.bfloat16, 2), (torch.float16, 2)])
def test_other_dtypes(dtype: torch.dtype, epsilons: int) -> None:
    """Three factorisations in float32 lose tens of epsilons; half precision rounds only the probes and the result."""
    system = System.definite(0, 3.0)
    matrix, right = system.matrix.to(dtype), tuple((1e-3 * x).to(dtype) for x in system.right)
    solution = linear.Nystrom(rank=SIZE, damping=1.0).solve(operator(matrix), right)
    assert {x.dtype for x in solution.value} == {dtype}
    expected = torch.linalg.solve(matrix.double() + torch.eye(SIZE), flatten(right).double())
    assert distance(flatten(solution.value).double(), expected) < epsilons * torch.finfo(dtype).eps


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@drawn(10)
@given(seed=seeds)
def test_the_preconditioner_saves_conjugate_gradients_iterations(dtype: torch.dtype, damping: float, seed: int) -> None:
    """With a few large eigenvalues above the others, at most half the iterations are needed."""
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
    plain, preconditioned = solutions
    assert plain.converged is preconditioned.converged is True
    assert preconditioned.products == preconditioned.iterations + 8
    assert 2 * preconditioned.iterations <= plain.iterations
    if dtype == torch.float64:
        assert distance(preconditioned.value[0], torch.linalg.solve(matrix + damping * torch.eye(n), right)) < 1e-4


@drawn(10)
@given(seed=seeds, condition=st.floats(2, 100), damping=st.sampled_from([0.0, 0.5]))
def test_a_preconditioner_of_full_rank_needs_one_iteration(seed: int, condition: float, damping: float) -> None:
    system = System.definite(seed, condition)
    solver = linear.ConjugateGradient(
        rtol=1e-9, damping=damping, preconditioner=linear.NystromPreconditioner(rank=SIZE)
    )
    solution = system.solve(solver)
    assert (solution.iterations, solution.products, system.products) == (1, SIZE + 1, SIZE + 1)
    assert distance(flatten(solution.value), system.exact(damping)) < 1e-8


def test_a_converged_start_does_not_prepare_the_preconditioner() -> None:
    system = System.definite(0, 3.0)
    solver = linear.ConjugateGradient(rtol=1e-8, preconditioner=linear.NystromPreconditioner(rank=5))
    start = unflatten(system.exact(), system.right)
    assert solver.solve(system.matvec, system.right, initial=start).products == system.products == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [5, SPREAD])
def test_the_approximation_is_orthonormal_and_as_exact_as_rounding_over_sixteen_orders_of_magnitude(
    rank: int, dtype: torch.dtype
) -> None:
    """A Gram matrix alone would lose half the digits; small eigenvalues are those of the Nystrom formula."""
    eigenvalues = 10.0 ** -torch.linspace(0, 16, SPREAD)
    matrix = random_matrix(0, eigenvalues).to(dtype)
    multiplied: list[Tensor] = []

    def matvec(vector: Tensors) -> Tensors:
        multiplied.append(vector[0])
        return (matrix @ vector[0],)

    low_rank = _approximate(matvec, (torch.zeros(SPREAD, dtype=dtype),), rank, 0.0, 0)
    epsilon = torch.finfo(dtype).eps
    assert torch.allclose(
        low_rank.basis @ low_rank.basis.T, torch.eye(len(low_rank.basis), dtype=dtype), atol=9 * epsilon
    )
    probes, exact = torch.stack(multiplied, dim=1).double(), matrix.double()
    images = exact @ probes
    expected = images @ torch.linalg.inv(probes.T @ images) @ images.T if rank < SPREAD else exact
    approximation = (low_rank.basis.T * low_rank.eigenvalues) @ low_rank.basis
    assert torch.linalg.matrix_norm(approximation - expected, ord=2) < 100 * epsilon


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@drawn(60)
@given(seed=seeds, n=st.integers(1, 6), spare=st.integers(0, 3), zeros=st.integers(0, 6), damping=st.floats(1e-2, 10.0))
def test_tiny_and_rank_deficient_matrices(
    dtype: torch.dtype, seed: int, n: int, spare: int, zeros: int, damping: float
) -> None:
    """The solution is exact if the probes span the range, up to rounding over the damping and the angle between the two."""
    rank = max(n - zeros, 0)
    eigenvalues = torch.zeros(n)
    eigenvalues[:rank] = torch.linspace(1, 5, rank)
    matrix = random_matrix(seed, eigenvalues).to(dtype)
    right = torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)
    multiplied: list[Tensor] = []

    def matvec(vector: Tensors) -> Tensors:
        multiplied.append(vector[0])
        return (matrix @ vector[0],)

    solution = linear.Nystrom(rank=max(rank + spare, 1), damping=damping).solve(matvec, (right,))
    epsilon = torch.finfo(dtype).eps
    probes = torch.stack(multiplied[:-1])
    assert len(probes) == min(max(rank + spare, 1), n)
    assert torch.allclose(probes @ probes.T, torch.eye(len(probes), dtype=dtype), atol=30 * epsilon)
    expected = torch.linalg.solve(matrix.double() + damping * torch.eye(n), right.double())
    met = float(
        torch.linalg.svdvals(probes.double() @ torch.linalg.pinv(matrix.double(), rtol=1e-5) @ matrix.double())[
            rank - 1
        ]
    )
    assert (
        distance(solution.value[0].double(), expected) < 100 * epsilon * (1 + 5 / damping) / (met if rank else 1.0) ** 2
    )
    assert solution.remark == ""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@drawn(30)
@given(seed=seeds, count=st.integers(2, 6), spread=st.floats(0, 5))
def test_nearly_dependent_probes_are_made_orthonormal(dtype: torch.dtype, seed: int, count: int, spread: float) -> None:
    """A Gram matrix alone would lose twice as many digits as the rows' condition has; the span stays that of the rows."""
    rows = torch.randn(count, 50, generator=torch.Generator().manual_seed(seed))
    rows[1:] = rows[0] + 10**-spread * rows[1:]
    rows = rows.to(dtype)
    before = rows.double()
    _orthonormalize(rows)
    assert torch.allclose(rows @ rows.T, torch.eye(count, dtype=dtype), atol=30 * torch.finfo(dtype).eps)
    outside = before - (before @ rows.double().T) @ rows.double()
    assert outside.norm() < 300 * torch.finfo(dtype).eps * before.norm()


@pytest.mark.parametrize("rank", [1, 10])
def test_the_memory_is_two_vectors_a_probe_and_a_few_more(rank: int) -> None:
    n = 300_000
    diagonal, right = torch.rand(n), (torch.ones(n),)
    solver = linear.Nystrom(rank=rank, damping=1.0)
    peak = peak_memory(lambda: solver.solve(lambda v: (diagonal * v[0],), right), "cpu")
    assert 2 * rank < peak / (n * right[0].element_size()) < 2 * rank + 5


def test_the_memory_of_a_hypergradient() -> None:
    """A network's own graph and products included: at most thirty copies of its parameters at rank ten."""
    network, inputs = nn.Linear(2_000, 100), torch.randn(20, 2_000)

    def training(module: nn.Module, batch: None, *, weights: nn.Module) -> Tensor:
        return (module(inputs).tanh().square().mean(1) * weights()).mean()

    def validation(module: nn.Module, batch: None, *, network: nn.Module) -> Tensor:
        return network(inputs).square().mean()

    problem = mlopt.Problem(
        mlopt.Level("weights", mlopt.variables(torch.ones(20)), validation),
        mlopt.Level("network", network, training, estimator=mlopt.Nystrom(rank=10, damping=1.0)),
    )
    size = sum(p.numel() * p.element_size() for p in network.parameters())
    assert peak_memory(lambda: mlopt.hypergradient(problem), "cpu") < 30 * size
