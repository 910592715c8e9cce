"""Conjugate gradients on the normal equations, for matrices whose transposed products are known."""

from __future__ import annotations

import math

from ..errors import NonFiniteError
from ..tensors import Tensors, axpy, scale, zeros_like
from .krylov import Stopping, dots
from .solver import Matrix

__all__ = ["normal_equations"]


def normal_equations(
    matrix: Matrix, solution: Tensors, residual: Tensors, iterations: int, stopping: Stopping, norm: float = 0.0
) -> tuple[Tensors, float, tuple[int, int], bool]:
    """Solve A^T A x = A^T b by conjugate gradients, for any A: the residual decreases in every iteration.

    The condition number is squared, so this is for systems on which other methods stagnate. An iteration takes a product with A
    and one with A^T, and none with A^T A (CGLS), which keeps the accuracy of A. Residuals and gradients are normalised before
    each product, so that no square leaves the range of the dtype, whatever the units of A are.

    Args:
        matrix: the products with A and A^T.
        solution: the start.
        residual: b - A x there.
        iterations: the most iterations.
        stopping: the stopping rule.
        norm: a lower bound of the norm of A, against which A^T r counts as rounding.

    Returns:
        The solution, the norm of its residual, the numbers of iterations and of products, and True if A^T r vanished before r
        did: then A is numerically singular, and no other solution has a smaller residual.

    Raises:
        NonFiniteError: a product is not finite.

    Source: Hestenes & Stiefel 1952, section 10; Paige & Saunders 1982, ACM Transactions on Mathematical Software 8(1), section 7.
    """
    remaining, largest, previous, k = math.sqrt(dots((residual, residual))[0]), norm, math.inf, 0
    direction = zeros_like(residual)
    while k < iterations and not stopping.met(remaining):
        gradient = matrix.transposed(scale(1.0 / remaining, residual))
        steepness = math.sqrt(_finite(dots((gradient, gradient))[0], "the transposed matrix", k))
        largest = max(largest, steepness)
        if steepness <= stopping.rounding * largest:
            return solution, remaining, (k, 2 * k + 1), True
        slope = remaining * steepness
        direction = axpy(slope / previous, direction, scale(1.0 / steepness, gradient))
        product = matrix(direction)
        square, length = dots((product, product), (direction, direction))
        k += 1
        largest = max(largest, math.sqrt(_finite(square, "the matrix", k - 1) / length))
        # <r, A d> = |A^T r|, so only a wrong transpose has A d = 0.
        step = slope / square if square else 0.0
        solution, residual = axpy(step, direction, solution), axpy(-step, product, residual)
        remaining, previous = math.sqrt(dots((residual, residual))[0]), slope
    return solution, remaining, (k, 2 * k), False


def _finite(square: float, name: str, k: int) -> float:
    """Return the square of the norm of a product, after checking that it is finite."""
    if not math.isfinite(square):
        raise NonFiniteError(
            f"conjugate gradients on the normal equations: a product with {name} is not finite at iteration {k + 1}"
        )
    return square
