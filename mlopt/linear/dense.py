"""The matrix written out and factorised: the oracle."""

from __future__ import annotations

import attrs
import torch

from ..errors import EstimatorError
from ..tensors import Tensors, flatten, norm, subtract, unflatten
from ..validation import at_least
from .solver import LinearSolution, LinearSolver, MatVec

__all__ = ["Dense"]


@attrs.frozen(kw_only=True)
class Dense(LinearSolver):
    """A written out by n products with unit vectors, then an LU solve: exact, for small n.

    Args:
        damping: added to the diagonal of A.
        limit: the most unknowns; n x n numbers are kept.
    """

    damping: float = attrs.field(default=0.0, validator=at_least(0))
    limit: int = attrs.field(default=5_000, validator=at_least(1))

    def _solve(self, matvec: MatVec, rhs: Tensors, size: float, initial: Tensors | None) -> LinearSolution:
        flat = flatten(rhs)
        n = flat.numel()
        if n > self.limit:
            raise EstimatorError(
                f"Dense: the level has {n} unknowns and limit={self.limit}; use ConjugateGradient, or raise the limit"
            )
        columns = [flatten(matvec(unflatten(unit, rhs))) for unit in torch.eye(n, dtype=flat.dtype, device=flat.device)]
        matrix = torch.stack(columns, dim=1)
        value = unflatten(torch.linalg.solve(matrix, flat), rhs)
        residual = float(norm(subtract(rhs, unflatten(matrix @ flatten(value), rhs)))) / size
        eigenvalues = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
        low, high = float(eigenvalues[0]), float(eigenvalues[-1])
        return LinearSolution(
            value=value,
            residual=residual,
            iterations=n,
            products=n,
            converged=True,
            curvature=(low, high),
            remark="" if low > 0 else f"negative curvature {low:.3g}",
        )
