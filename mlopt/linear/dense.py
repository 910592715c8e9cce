"""The matrix written out and factorised: the oracle."""

from __future__ import annotations

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from ..errors import EstimatorError, NonFiniteError
from ..tensors import Tensors, flatten, unflatten
from ..validation import at_least
from .solver import LinearSolution, LinearSolver, MatVec, SolveCost

__all__ = ["Dense"]

#: The residual below which the factorisation counts as converged; single precision leaves about 1e-6.
_EXACT = 1e-3


@attrs.frozen(kw_only=True)
class Dense(LinearSolver):
    """Write A out by n products with unit vectors, then solve by LU: exact, for small n.

    If A is singular, the solution is that of least norm, by the pseudo-inverse. Rounding hides this from LU, so it is also
    taken if LU leaves a residual.

    Args:
        damping: added to the diagonal of A.
        limit: the most unknowns; n x n numbers are kept.

    Raises:
        EstimatorError: in a solve, if there are more unknowns than `limit`.

    Example:
        >>> mlopt.linear.Dense(damping=1.0).solve(lambda v: (3.0 * v[0],), (torch.ones(2),)).value
        (tensor([0.2500, 0.2500]),)
    """

    needs_symmetry: ClassVar[bool] = False

    damping: float = attrs.field(default=0.0, validator=at_least(0.0))
    limit: int = attrs.field(default=5_000, validator=at_least(1))

    def cost(self, unknowns: int) -> SolveCost:
        # The matrix, its columns, the unit vectors and a symmetric copy, in numbers of columns.
        return SolveCost(4 * unknowns + 1, unknowns)

    def _solve(self, matvec: MatVec, rhs: Tensors, size: float, initial: Tensors | None) -> LinearSolution:
        flat = flatten(rhs)
        n = flat.numel()
        if n > self.limit:
            raise EstimatorError(
                f"Dense: the level has {n} unknowns and limit={self.limit}; use ConjugateGradient, or raise the limit"
            )
        columns = [flatten(matvec(unflatten(unit, rhs))) for unit in torch.eye(n, dtype=flat.dtype, device=flat.device)]
        matrix = torch.stack(columns, dim=1)
        if not torch.isfinite(matrix).all():
            raise NonFiniteError(f"{self}: a product with the Hessian is not finite")
        # There are no factorisations in the half precisions.
        working = torch.promote_types(flat.dtype, torch.float32)
        matrix, flat = matrix.to(working), flat.to(working)
        eigenvalues = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
        low, high = float(eigenvalues[0]), float(eigenvalues[-1])
        remark = "" if low > 0 else f"negative curvature {low:.3g}"

        def left(solution: Tensor) -> float:
            return float(torch.linalg.vector_norm(flat - matrix @ solution)) / size

        solution, info = torch.linalg.solve_ex(matrix, flat)
        if info or not left(solution) < _EXACT:
            # A variable that the objective does not use has an empty row; the solution of least norm leaves it at zero.
            solution = torch.linalg.pinv(matrix) @ flat
            remark = "the matrix is singular; solved by its pseudo-inverse"
        residual = left(solution)
        return LinearSolution(
            value=tuple(x.to(y) for x, y in zip(unflatten(solution, rhs), rhs, strict=True)),
            residual=residual,
            iterations=n,
            products=n,
            converged=residual < _EXACT,
            curvature=(low, high),
            remark=remark,
        )
