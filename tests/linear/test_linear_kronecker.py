"""Kronecker products against dense matrices."""

from __future__ import annotations

import pytest
import torch
from core_cases import drawn, seeds
from hypothesis import given
from hypothesis import strategies as st

from mlopt.linear import Kronecker


def semi_definite(size: int, rank: int, generator: torch.Generator) -> torch.Tensor:
    root = torch.randn(size, rank, dtype=torch.float64, generator=generator)
    return root @ root.T


@pytest.mark.parametrize("diagonal", [False, True])
@drawn(20)
@given(seed=seeds, shift=st.floats(0.01, 10), rank=st.integers(0, 4))
def test_it_solves_as_the_dense_matrix_does(diagonal: bool, seed: int, shift: float, rank: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    right, left = semi_definite(4, rank, generator), semi_definite(3, rank, generator)
    if diagonal:
        right = right.diag()
    product = Kronecker.of(right, left)
    matrix = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    dense = torch.kron(left, right.diag() if diagonal else right)
    expected = torch.linalg.solve(dense + shift * torch.eye(12, dtype=torch.float64), matrix.reshape(-1))
    torch.testing.assert_close(product.solve(matrix, torch.tensor(shift)).reshape(-1), expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(
        product.largest, torch.linalg.eigvalsh(dense).amax().clamp_min(0.0), rtol=1e-9, atol=1e-12
    )


def test_it_computes_in_the_finer_dtype_and_returns_that_of_the_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    right, left = semi_definite(4, 4, generator), semi_definite(3, 3, generator)
    matrix, shift = torch.randn(3, 4, dtype=torch.float32, generator=generator), torch.tensor(0.1)
    expected = Kronecker.of(right.float().double(), left).solve(matrix.double(), shift)
    solved = Kronecker.of(right.float(), left).solve(matrix, shift)
    assert solved.dtype == torch.float32
    torch.testing.assert_close(solved.double(), expected, rtol=1e-6, atol=1e-7)


def test_rounding_below_zero_counts_as_zero() -> None:
    """An inverse with a negative eigenvalue is not a preconditioner."""
    product = Kronecker.of(torch.diag(torch.tensor([1.0, -1e-3])), torch.eye(1))
    solved = product.solve(torch.ones(1, 2), torch.tensor(1e-4))
    torch.testing.assert_close(solved, torch.tensor([[1 / 1.0001, 1e4]]))
