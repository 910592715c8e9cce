"""MINRES: the property of each iterate, indefinite and singular matrices, and the remarks about them."""

from __future__ import annotations

import pytest
import torch
from core_cases import distance, drawn, seeds
from hypothesis import given
from hypothesis import strategies as st
from test_linear import SIZE, System
from torch import Tensor

from mlopt import linear
from mlopt.tensors import flatten, unflatten

#: Numbers of negative eigenvalues.
negatives = st.integers(0, SIZE)


def spectrum(seed: int, negative: int, condition: float = 20.0) -> Tensor:
    """Return eigenvalues of absolute values from 1 to `condition`, the first `negative` of them below zero."""
    sizes = condition ** torch.rand(SIZE, generator=torch.Generator().manual_seed(seed))
    sizes[:negative] *= -1
    return sizes


@pytest.mark.parametrize("warm", [False, True])
@drawn(25)
@given(seed=seeds, negative=negatives)
def test_indefinite_systems_are_solved(warm: bool, seed: int, negative: int) -> None:
    system = System(seed, spectrum(seed, negative))
    solver = linear.MINRES(iterations=100, rtol=1e-11)
    solution = system.solve(solver, warm=warm)
    assert distance(flatten(solution.value), system.exact()) < 1e-8
    assert solution.converged is True
    assert solution.remark == ""
    assert solution.residual == pytest.approx(system.residual(solution.value), abs=1e-12)
    assert solution.products == system.products == solution.iterations + warm


@drawn(25)
@given(seed=seeds, negative=negatives, iterations=st.integers(1, 7), warm=st.booleans())
def test_each_iterate_has_the_least_residual_of_the_krylov_space(
    seed: int, negative: int, iterations: int, warm: bool
) -> None:
    system = System(seed, spectrum(seed, negative))
    start = system.start if warm else tuple(0 * x for x in system.start)
    solver = linear.MINRES(iterations=iterations, rtol=0.0)
    solution = solver.solve(system.matvec, system.right, initial=start if warm else None)
    residual = flatten(system.right) - system.matrix @ flatten(start)
    basis = [residual / residual.norm()]
    for _ in range(iterations - 1):
        power = system.matrix @ basis[-1]
        for _ in range(2):
            power = power - torch.stack(basis).T @ (torch.stack(basis) @ power)
        basis.append(power / power.norm())
    space = torch.stack(basis, dim=1)
    best = flatten(start) + space @ torch.linalg.lstsq(system.matrix @ space, residual).solution
    assert distance(flatten(solution.value), best) < 1e-7
    assert solution.residual == pytest.approx(system.residual(solution.value), rel=1e-8)


@drawn(25)
@given(seed=seeds, negative=st.integers(1, SIZE - 1))
def test_negative_curvature_is_reported_when_conjugate_gradients_would_stop(seed: int, negative: int) -> None:
    """The reported range turns negative at the same iteration; its values are Rayleigh quotients of the matrix."""
    eigenvalues = spectrum(seed, negative)
    system = System(seed, eigenvalues)
    other = system.solve(linear.ConjugateGradient(iterations=SIZE, rtol=1e-9))
    assert other.remark.startswith("negative curvature -")
    for iterations in range(1, other.iterations + 2):
        solution = system.solve(linear.MINRES(iterations=iterations, rtol=0.0))
        low, high = solution.curvature
        assert (low < 0) == (iterations == other.iterations + 1)
        assert float(eigenvalues.min()) - 1e-9 <= low <= high <= float(eigenvalues.max()) + 1e-9
        assert solution.remark == ""


@drawn(25)
@given(seed=seeds, negative=st.integers(0, SIZE - 1), zeros=st.integers(1, 3))
def test_singular_systems_are_solved_in_their_range(seed: int, negative: int, zeros: int) -> None:
    eigenvalues = spectrum(seed, negative)
    eigenvalues[-zeros:] = 0
    system = System(seed, eigenvalues)
    system.right = unflatten(system.matrix @ flatten(system.start), system.start)
    solution = system.solve(linear.MINRES(iterations=200, rtol=1e-11))
    assert solution.converged is True
    assert solution.remark == ""
    # From zero, no step leaves the range: the result is the solution of least norm.
    assert distance(flatten(solution.value), torch.linalg.pinv(system.matrix, rtol=1e-9) @ flatten(system.right)) < 1e-8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@drawn(25)
@given(seed=seeds, negative=st.integers(0, SIZE - 1), zeros=st.integers(1, 3), warm=st.booleans())
def test_a_right_hand_side_outside_the_range_is_reported(
    dtype: torch.dtype, seed: int, negative: int, zeros: int, warm: bool
) -> None:
    """The solver reaches the least residual and stops: more iterations would make the solution diverge."""
    eigenvalues = spectrum(seed, negative)
    eigenvalues[-zeros:] = 0
    system = System(seed, eigenvalues)
    system.matrix = system.matrix.to(dtype)
    system.right, system.start = (tuple(x.to(dtype) for x in v) for v in (system.right, system.start))
    solution = linear.MINRES(iterations=1_000, rtol=0.0).solve(
        system.matvec, system.right, initial=system.start if warm else None
    )
    matrix, right = system.matrix.double(), flatten(system.right).double()
    least = float((right - matrix @ (torch.linalg.pinv(matrix, rtol=1e-4) @ right)).norm() / right.norm())
    assert solution.converged is False
    assert solution.remark.startswith("numerically singular: the residual stays at ")
    assert solution.residual == pytest.approx(least, rel=100 * torch.finfo(dtype).eps ** 0.5)
    assert system.residual(tuple(x.to(dtype) for x in solution.value)) == pytest.approx(solution.residual, rel=1e-3)
    assert solution.iterations < 100


def test_a_matrix_of_zeros_is_reported() -> None:
    right = (torch.ones(3),)
    solution = linear.MINRES().solve(lambda v: (0 * v[0],), right)
    assert torch.equal(solution.value[0], right[0])
    assert solution.remark == "numerically singular: the residual stays at 1; raise the damping"
    assert (solution.residual, solution.converged, solution.products) == (1.0, False, 1)


def test_an_eigenvector_takes_one_iteration() -> None:
    """The Lanczos recurrence ends there exactly: the next coefficient, a divisor, is zero."""
    right = (torch.tensor([0.0, 3.0, 0.0]),)
    solution = linear.MINRES(rtol=0.0).solve(lambda v: (torch.tensor([1.0, -2.0, 4.0]) * v[0],), right)
    assert torch.equal(solution.value[0], torch.tensor([0.0, -1.5, 0.0]))
    assert (solution.residual, solution.converged, solution.iterations) == (0.0, True, 1)
    assert solution.curvature == (-2.0, -2.0)
