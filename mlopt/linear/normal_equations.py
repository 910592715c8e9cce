"""Conjugate gradients on the normal equations, for matrices whose transposed products are known."""

from __future__ import annotations

import math

import torch

from ..errors import NonFiniteError
from ..tensors import Tensors, axpy, scale
from .krylov import Stopping, dots
from .solver import Matrix

__all__ = ["normal_equations"]


def normal_equations(
    matrix: Matrix, solution: Tensors, residual: Tensors, iterations: int, stopping: Stopping
) -> tuple[Tensors, float, int, bool]:
    """Solve A^T A x = A^T b by conjugate gradients, for any A: the residual decreases in every iteration.

    The condition number is squared, so this is for systems that other methods leave where they are. An iteration takes a product
    with A and one with A^T, neither with A^T A itself (CGLS), which keeps the accuracy of A.

    Args:
        matrix: the products with A and A^T.
        solution: the start.
        residual: b - A x there.
        iterations: the most iterations.
        stopping: the stopping rule.

    Returns:
        The solution, the norm of its residual, the number of iterations, and True if A^T r vanished before r did: then A is
        singular to rounding, and no other solution has a smaller residual.

    Raises:
        NonFiniteError: a product is not finite.

    Source: Hestenes & Stiefel 1952, section 10; Paige & Saunders 1982, ACM Transactions on Mathematical Software 8(1), section 7.
    """
    gradient = matrix.transposed(residual)
    direction = gradient
    square, slope = dots((residual, residual), (gradient, gradient))
    largest, k = 0.0, 0
    while k < iterations and not stopping.met(math.sqrt(square)):
        if not math.isfinite(slope):
            raise NonFiniteError(
                f"conjugate gradients on the normal equations: a product with the transposed matrix is not finite at iteration "
                f"{k + 1}"
            )
        if not math.sqrt(slope) > stopping.rounding * largest * math.sqrt(square):
            return solution, math.sqrt(square), k, True
        product = matrix(direction)
        length, norm = dots((product, product), (direction, direction))
        largest = max(largest, math.sqrt(length / norm))
        if not length:
            return solution, math.sqrt(square), k, True
        k += 1
        solution = axpy(slope / length, direction, solution)
        residual = axpy(-slope / length, product, residual)
        gradient = matrix.transposed(residual)
        previous = slope
        square, slope = dots((residual, residual), (gradient, gradient))
        direction = tuple(torch._foreach_add(list(gradient), list(scale(slope / previous, direction))))
    return solution, math.sqrt(square), k, False
