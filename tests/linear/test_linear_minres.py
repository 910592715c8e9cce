"""Minimal residuals: what each iterate minimises, indefinite and singular matrices, and what is reported of them."""

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

#: How often eigenvalues below zero are drawn.
negatives = st.integers(0, SIZE)


def spectrum(seed: int, negative: int, condition: float = 20.0) -> Tensor:
    """Return eigenvalues between 1 and the condition in size, so many of them below zero."""
    sizes = condition ** torch.rand(SIZE, generator=torch.Generator().manual_seed(seed))
    sizes[:negative] *= -1
    return sizes


@pytest.mark.parametrize("warm", [False, True])
@drawn(25)
@given(seed=seeds, negative=negatives)
def test_indefinite_systems_are_solved(warm: bool, seed: int, negative: int) -> None:
    system = System(seed, spectrum(seed, negative))
    solver = linear.MINRES(iterations=100, rtol=1e-11)
    found = solver.solve(system.matvec, system.right, initial=system.start if warm else None)
    assert distance(flatten(found.value), system.exact()) < 1e-8
    assert found.converged is True
    assert found.remark == ""
    assert found.residual == pytest.approx(system.residual(found.value), abs=1e-12)
    assert found.products == system.products == found.iterations + warm


@drawn(25)
@given(seed=seeds, negative=negatives, iterations=st.integers(1, 7), warm=st.booleans())
def test_each_iterate_has_the_least_residual_of_the_krylov_space(
    seed: int, negative: int, iterations: int, warm: bool
) -> None:
    system = System(seed, spectrum(seed, negative))
    start = system.start if warm else tuple(0 * x for x in system.start)
    solver = linear.MINRES(iterations=iterations, rtol=0.0)
    found = solver.solve(system.matvec, system.right, initial=start if warm else None)
    residual = flatten(system.right) - system.matrix @ flatten(start)
    basis = [residual / residual.norm()]
    for _ in range(iterations - 1):
        power = system.matrix @ basis[-1]
        for _ in range(2):
            power = power - torch.stack(basis).T @ (torch.stack(basis) @ power)
        basis.append(power / power.norm())
    space = torch.stack(basis, dim=1)
    best = flatten(start) + space @ torch.linalg.lstsq(system.matrix @ space, residual).solution
    assert distance(flatten(found.value), best) < 1e-7
    assert found.residual == pytest.approx(system.residual(found.value), rel=1e-8)


@drawn(25)
@given(seed=seeds, negative=st.integers(1, SIZE - 1))
def test_the_curvature_shows_where_conjugate_gradients_would_stop(seed: int, negative: int) -> None:
    """And there only: its quotients are Rayleigh quotients of the matrix."""
    eigenvalues = spectrum(seed, negative)
    system = System(seed, eigenvalues)
    other = linear.ConjugateGradient(iterations=SIZE, rtol=1e-9).solve(system.matvec, system.right)
    assert other.remark.startswith("negative curvature -")
    for iterations in range(1, other.iterations + 2):
        found = linear.MINRES(iterations=iterations, rtol=0.0).solve(system.matvec, system.right)
        low, high = found.curvature
        assert (low < 0) == (iterations == other.iterations + 1)
        assert float(eigenvalues.min()) - 1e-9 <= low <= high <= float(eigenvalues.max()) + 1e-9
        assert found.remark == ""


@drawn(25)
@given(seed=seeds, negative=st.integers(0, SIZE - 1), zeros=st.integers(1, 3))
def test_singular_systems_are_solved_in_their_range(seed: int, negative: int, zeros: int) -> None:
    eigenvalues = spectrum(seed, negative)
    eigenvalues[-zeros:] = 0
    system = System(seed, eigenvalues)
    system.right = unflatten(system.matrix @ flatten(system.start), system.start)
    found = linear.MINRES(iterations=200, rtol=1e-11).solve(system.matvec, system.right)
    assert found.converged is True
    assert found.remark == ""
    # From zero, no step leaves the range: it is the solution of least norm.
    assert distance(flatten(found.value), torch.linalg.pinv(system.matrix, rtol=1e-9) @ flatten(system.right)) < 1e-8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@drawn(25)
@given(seed=seeds, negative=st.integers(0, SIZE - 1), zeros=st.integers(1, 3), warm=st.booleans())
def test_a_right_hand_side_outside_the_range_is_said(
    dtype: torch.dtype, seed: int, negative: int, zeros: int, warm: bool
) -> None:
    """The least residual is reached and kept: more iterations would only blow the solution up."""
    eigenvalues = spectrum(seed, negative)
    eigenvalues[-zeros:] = 0
    system = System(seed, eigenvalues)
    system.matrix = system.matrix.to(dtype)
    system.right, system.start = (tuple(x.to(dtype) for x in v) for v in (system.right, system.start))
    found = linear.MINRES(iterations=1_000, rtol=0.0).solve(
        system.matvec, system.right, initial=system.start if warm else None
    )
    matrix, right = system.matrix.double(), flatten(system.right).double()
    least = float((right - matrix @ (torch.linalg.pinv(matrix, rtol=1e-4) @ right)).norm() / right.norm())
    assert found.converged is False
    assert found.remark.startswith("singular to rounding: the residual stays at ")
    assert found.residual == pytest.approx(least, rel=100 * torch.finfo(dtype).eps ** 0.5)
    assert system.residual(tuple(x.to(dtype) for x in found.value)) == pytest.approx(found.residual, rel=1e-3)
    assert found.iterations < 100


def test_a_matrix_of_zeros_is_said() -> None:
    right = (torch.ones(3),)
    found = linear.MINRES().solve(lambda v: (0 * v[0],), right)
    assert not found.value[0].any()
    assert found.remark == "singular to rounding: the residual stays at 1; raise the damping"
    assert (found.residual, found.converged, found.products) == (1.0, False, 1)


def test_an_eigenvector_takes_one_iteration() -> None:
    """Lanczos' recurrence ends there exactly, with nothing left to divide by."""
    right = (torch.tensor([0.0, 3.0, 0.0]),)
    found = linear.MINRES(rtol=0.0).solve(lambda v: (torch.tensor([1.0, -2.0, 4.0]) * v[0],), right)
    assert torch.equal(found.value[0], torch.tensor([0.0, -1.5, 0.0]))
    assert (found.residual, found.converged, found.iterations) == (0.0, True, 1)
    assert found.curvature == (-2.0, -2.0)
