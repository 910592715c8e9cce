"""GMRES: the property of each iterate, nonsymmetric and singular matrices, restarts, and the remarks about them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from core_cases import distance, drawn, seeds
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, gmres
from test_linear import SIZE, System
from torch import Tensor

import mlopt
from mlopt import linear
from mlopt.linear.krylov import Stopping
from mlopt.linear.normal_equations import normal_equations
from mlopt.tensors import Tensors, flatten, unflatten

shifts = st.floats(-3.0, 6.0)


def nonsymmetric(seed: int, shift: float = 4.0) -> System:
    """Return a system with a random matrix whose entries are about 1, plus a multiple of the identity."""
    system = System(seed, torch.ones(SIZE))
    noise = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    system.matrix = noise + shift * torch.eye(SIZE)
    return system


def of_rank(seed: int, rank: int) -> System:
    """Return a system with a random matrix of a rank, and a right-hand side outside its range."""
    system = nonsymmetric(seed)
    left, right = (torch.randn(SIZE, rank, generator=torch.Generator().manual_seed(seed + k)) for k in (1, 2))
    system.matrix = torch.linalg.qr(left).Q @ torch.linalg.qr(right).Q.T
    return system


@pytest.mark.parametrize("warm", [False, True])
@drawn(25)
@given(seed=seeds, shift=shifts, damping=st.one_of(st.just(0.0), st.floats(0.01, 5)))
def test_nonsymmetric_systems_are_solved(warm: bool, seed: int, shift: float, damping: float) -> None:
    system = nonsymmetric(seed, shift)
    solution = system.solve(linear.GMRES(iterations=100, rtol=1e-11, damping=damping), warm=warm)
    condition = float(torch.linalg.cond(system.matrix + damping * torch.eye(SIZE)))
    assert distance(flatten(solution.value), system.exact(damping)) < 1e-11 * condition
    assert solution.converged is True
    assert solution.remark == ""
    assert solution.residual == pytest.approx(system.residual(solution.value, damping), abs=1e-11)
    assert solution.products == system.products == solution.iterations + warm


@drawn(25)
@given(seed=seeds, shift=shifts, iterations=st.integers(1, 7), warm=st.booleans())
def test_each_iterate_has_the_least_residual_of_the_krylov_space(
    seed: int, shift: float, iterations: int, warm: bool
) -> None:
    system = nonsymmetric(seed, shift)
    start = system.start if warm else tuple(0 * x for x in system.start)
    solution = linear.GMRES(iterations=iterations, rtol=0.0).solve(
        system.matvec, system.right, initial=start if warm else None
    )
    space = krylov(system.matrix, flatten(system.right) - system.matrix @ flatten(start), iterations)
    residual = flatten(system.right) - system.matrix @ flatten(start)
    best = flatten(start) + space @ torch.linalg.lstsq(system.matrix @ space, residual).solution
    assert distance(flatten(solution.value), best) < 1e-7
    assert solution.residual == pytest.approx(system.residual(solution.value), rel=1e-7, abs=1e-12)


def krylov(matrix: Tensor, start: Tensor, count: int) -> Tensor:
    """Return an orthonormal basis of span{r, A r, ...}, (n, count)."""
    basis = [start / start.norm()]
    for _ in range(count - 1):
        power = matrix @ basis[-1]
        for _ in range(2):
            power = power - torch.stack(basis).T @ (torch.stack(basis) @ power)
        basis.append(power / power.norm())
    return torch.stack(basis, dim=1)


@drawn(15)
@given(seed=seeds, restart=st.integers(2, 6), cycles=st.integers(1, 4))
def test_restarts_are_those_of_scipy(seed: int, restart: int, cycles: int) -> None:
    system = nonsymmetric(seed)
    solution = system.solve(linear.GMRES(iterations=restart * cycles, restart=restart, rtol=0.0))
    matrix, right = system.matrix.numpy(), flatten(system.right).numpy()
    operator = LinearOperator(matrix.shape, matvec=lambda v: matrix @ v, dtype=np.float64)
    expected, _ = gmres(operator, right, rtol=0.0, atol=0.0, restart=restart, maxiter=cycles)
    assert distance(flatten(solution.value), torch.from_numpy(expected)) < 1e-8
    assert solution.products == restart * cycles


@drawn(25)
@given(seed=seeds, shift=shifts)
def test_the_curvature_is_that_of_the_symmetric_part(seed: int, shift: float) -> None:
    system = nonsymmetric(seed, shift)
    low, high = system.solve(linear.GMRES(iterations=SIZE, rtol=0.0)).curvature
    values = torch.linalg.eigvalsh((system.matrix + system.matrix.T) / 2)
    assert (low, high) == (pytest.approx(float(values[0]), rel=1e-6), pytest.approx(float(values[-1]), rel=1e-6))


@drawn(25)
@given(seed=seeds, rank=st.integers(1, SIZE - 1))
def test_singular_systems_leave_the_least_residual_of_the_space(seed: int, rank: int) -> None:
    """The solution stays finite, its residual is the one reported, and a remark says that the matrix is singular."""
    system = of_rank(seed, rank)
    solution = system.solve(linear.GMRES(iterations=1_000, rtol=0.0))
    space = krylov(system.matrix, flatten(system.right), solution.iterations)
    image = system.matrix @ space
    least = flatten(system.right) - image @ (torch.linalg.pinv(image, rtol=1e-9) @ flatten(system.right))
    size = float(flatten(system.right).norm())
    assert solution.converged is False
    assert solution.remark.startswith("numerically singular: the residual stays at ")
    assert solution.residual == pytest.approx(float(least.norm()) / size, rel=1e-6)
    assert system.residual(solution.value) == pytest.approx(solution.residual, rel=1e-6)
    assert float(flatten(solution.value).norm()) < 1e8 * size
    assert solution.iterations <= rank + 2


@drawn(25)
@given(seed=seeds, zeros=st.integers(1, SIZE - 1))
def test_consistent_systems_with_a_null_space_apart_are_solved(seed: int, zeros: int) -> None:
    system = nonsymmetric(seed)
    system.matrix[:zeros] = 0.0
    system.matrix[:, :zeros] = 0.0
    system.right = unflatten(system.matrix @ flatten(system.start), system.start)
    solution = system.solve(linear.GMRES(iterations=100, rtol=1e-11))
    assert solution.converged is True
    assert system.residual(solution.value) < 1e-10


def test_a_matrix_of_zeros_is_reported() -> None:
    right = (torch.ones(3),)
    solution = linear.GMRES().solve(lambda v: (0 * v[0],), right)
    assert torch.equal(solution.value[0], right[0])
    assert solution.remark == "numerically singular: the residual stays at 1; raise the damping"
    assert (solution.residual, solution.converged, solution.products) == (1.0, False, 1)


def test_an_eigenvector_takes_one_iteration() -> None:
    """The space is exhausted there with the solution in it, which is no difficulty."""
    right = (torch.tensor([0.0, 3.0, 0.0]),)
    solution = linear.GMRES(rtol=0.0).solve(lambda v: (torch.tensor([1.0, -2.0, 4.0]) * v[0],), right)
    torch.testing.assert_close(solution.value[0], torch.tensor([0.0, -1.5, 0.0]))
    assert (solution.converged, solution.iterations, solution.curvature) == (True, 1, (-2.0, -2.0))
    assert "singular" not in solution.remark


def test_a_cyclic_shift_needs_every_direction() -> None:
    """No iterate but the last reduces the residual; restarts never do."""
    right = (torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]),)
    whole, short = (
        linear.GMRES(iterations=20, restart=restart).solve(lambda v: (v[0].roll(1),), right) for restart in (None, 4)
    )
    torch.testing.assert_close(whole.value[0], torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]))
    assert (whole.iterations, whole.converged) == (5, True)
    assert (short.iterations, short.converged, short.residual) == (20, False, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coarse_dtypes_stop_at_rounding(dtype: torch.dtype) -> None:
    system = nonsymmetric(3)
    matrix, right = system.matrix.to(dtype), (flatten(system.right).to(dtype),)
    solution = linear.GMRES(iterations=100, rtol=0.0).solve(lambda v: (matrix @ v[0],), right)
    assert solution.value[0].dtype == dtype
    assert solution.iterations <= SIZE + 1
    assert distance(solution.value[0].double(), system.exact()) < 100 * torch.finfo(dtype).eps


@pytest.mark.parametrize("restart", [1, 3])
def test_restarts_that_stagnate_are_reported(restart: int) -> None:
    """The solution stays at zero, which pulls every cotangent back to zero."""
    shift = torch.roll(torch.eye(5, dtype=torch.float64), 1, 0)
    right = torch.eye(5, dtype=torch.float64)[0]
    solution = linear.GMRES(iterations=30, restart=restart).solve(lambda v: (shift @ v[0],), (right,))
    assert not solution.value[0].any()
    assert solution.converged is False
    assert "30 iterations did not lower the residual; raise restart" in solution.remark
    assert linear.GMRES(iterations=30).solve(lambda v: (shift @ v[0],), (right,)).remark == ""


def whole(matrix: Tensor) -> linear.Matrix:
    return linear.Matrix(lambda v: (matrix @ v[0],), lambda v: (matrix.T @ v[0],))


@pytest.mark.parametrize("restart", [1, 2, 4, None])
def test_normal_equations_take_over_where_restarts_stagnate(restart: int | None) -> None:
    """A cyclic permutation is orthogonal, so one iteration solves the normal equations."""
    size = 9
    shift = torch.roll(torch.eye(size, dtype=torch.float64), 1, 0)
    right = torch.eye(size, dtype=torch.float64)[0]
    calls = {"plain": 0, "transposed": 0}

    def counted(kind: str, matrix: Tensor) -> linear.MatVec:
        def product(vector: Tensors) -> Tensors:
            calls[kind] += 1
            return (matrix @ vector[0],)

        return product

    both = linear.Matrix(counted("plain", shift), counted("transposed", shift.T))
    solution = linear.GMRES(iterations=8, restart=restart).solve(both, (right,))
    assert distance(solution.value[0], torch.linalg.solve(shift, right)) < 1e-12
    first = restart or 8
    assert (solution.converged, solution.iterations) == (True, first + 1)
    assert solution.products == sum(calls.values()) == first + 3
    assert calls["transposed"] == 1
    assert solution.remark == (
        f"GMRES stagnated at a residual of 1 after {first} iterations; 1 of conjugate gradients on the normal equations lowered "
        f"it to {solution.residual:.3g}"
    )


@drawn(25)
@given(seed=seeds, shift=shifts, iterations=st.integers(1, 5), damping=st.one_of(st.just(0.0), st.floats(0.01, 5)))
def test_normal_equations_leave_the_least_residual_of_their_space(
    seed: int, shift: float, iterations: int, damping: float
) -> None:
    system = nonsymmetric(seed, shift)
    matrix, right = system.matrix + damping * torch.eye(SIZE), flatten(system.right)
    size = float(right.norm())
    stopping = Stopping.of(0.0, (right,), size, size)
    (value,), remaining, (k, products), singular = normal_equations(
        whole(matrix), (torch.zeros(SIZE),), (right,), iterations, stopping
    )
    space = krylov(matrix.T @ matrix, matrix.T @ right, iterations)
    best = space @ torch.linalg.lstsq(matrix @ space, right).solution
    assert (k, products, singular) == (iterations, 2 * iterations, False)
    assert distance(matrix @ value, matrix @ best) < 1e-7
    assert remaining == pytest.approx(float((right - matrix @ value).norm()), abs=1e-9 * size)


def test_a_singular_matrix_with_a_solution_outside_the_krylov_space_is_solved() -> None:
    """A b = 0, so the Krylov space of b is b alone; the solution is orthogonal to it."""
    matrix = torch.tensor([[0.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    solution = linear.GMRES().solve(whole(matrix), (torch.tensor([1.0, 0.0], dtype=torch.float64),))
    assert solution.value[0].tolist() == [0.0, 0.5]
    assert solution.converged is True


@drawn(20)
@given(seed=seeds, rank=st.integers(1, SIZE - 1))
@example(seed=577, rank=1)
def test_a_singular_matrix_without_a_solution_leaves_the_least_residual(seed: int, rank: int) -> None:
    system = of_rank(seed, rank)
    right = flatten(system.right)
    solution = linear.GMRES(iterations=1_000, rtol=0.0).solve(whole(system.matrix), (right,))
    least = right - system.matrix @ torch.linalg.lstsq(system.matrix, right, driver="gelsd").solution
    assert solution.converged is False
    assert solution.remark.startswith("numerically singular: the residual stays at ")
    assert solution.residual == pytest.approx(float(least.norm() / right.norm()), rel=1e-6)


@pytest.mark.parametrize("unit", [1e-15, 1e-12, 1e10, 1e15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normal_equations_do_not_depend_on_the_units_of_the_matrix(dtype: torch.dtype, unit: float) -> None:
    """The squares of products with A^T A would leave the range of the dtype."""
    shift = torch.roll(torch.eye(SIZE), 1, 0).to(dtype)
    matrix, right = (shift * unit).to(dtype), flatten(System(3, torch.ones(SIZE)).right).to(dtype)
    solution = linear.GMRES(restart=1).solve(whole(matrix), (right,))
    assert solution.converged is True
    expected = right.double().roll(-1) / matrix.double().max()
    assert distance(solution.value[0].double(), expected) < 10 * torch.finfo(dtype).eps


def test_a_short_last_cycle_does_not_count_as_stagnation() -> None:
    """The first cycles lower the residual; the last has one iteration, which cannot."""
    matrix = torch.block_diag(torch.roll(torch.eye(2, dtype=torch.float64), 1, 0) * torch.tensor([[1.0], [-1.0]]))
    matrix = torch.block_diag(matrix, 1.01 * matrix, 1.5 * matrix)
    right = torch.ones(6, dtype=torch.float64)
    solution = linear.GMRES(iterations=3, restart=2).solve(whole(matrix), (right,))
    assert (solution.iterations, solution.products, solution.remark) == (3, 3, "")
    assert 0.0 < solution.residual < 0.5


def test_a_wrong_transpose_leaves_the_solution() -> None:
    both = linear.Matrix(lambda v: (v[0] * torch.tensor([0.0, 1.0]),), lambda v: v)
    solution = linear.GMRES(iterations=3).solve(both, (torch.tensor([1.0, 0.0]),))
    assert (solution.residual, solution.converged) == (1.0, False)


def test_values_that_are_not_finite_raise() -> None:
    def product(vector: Tensors) -> Tensors:
        return (torch.full((3,), torch.inf),)

    with pytest.raises(mlopt.NonFiniteError, match=r"GMRES.*product with the matrix is not finite at iteration 1"):
        linear.GMRES().solve(product, (torch.ones(3),))
    shift = linear.Matrix(lambda v: (v[0].roll(1),), product)
    with pytest.raises(
        mlopt.NonFiniteError, match=r"normal equations: a product with the transposed matrix is not finite"
    ):
        linear.GMRES(iterations=1).solve(shift, (torch.tensor([1.0, 0.0, 0.0]),))
    calls = iter([True, True])
    shift = linear.Matrix(lambda v: (v[0].roll(1),) if next(calls, False) else product(v), lambda v: (v[0].roll(-1),))
    with pytest.raises(mlopt.NonFiniteError, match=r"normal equations: a product with the matrix is not finite"):
        linear.GMRES(iterations=1).solve(shift, (torch.tensor([1.0, 0.0, 0.0]),))


@pytest.mark.parametrize(("name", "value"), [("iterations", 0), ("restart", 0), ("restart", True), ("rtol", -1.0)])
def test_invalid_arguments_are_refused(name: str, value: object) -> None:
    with pytest.raises(mlopt.ArgumentError, match=f"GMRES: {name}="):
        linear.GMRES(**{name: value})


def test_solvers_say_if_they_need_a_symmetric_matrix() -> None:
    need = {name for name in linear.__all__ if getattr(getattr(linear, name), "needs_symmetry", False)}
    assert need == {"LinearSolver", "ConjugateGradient", "MINRES", "Nystrom"}
