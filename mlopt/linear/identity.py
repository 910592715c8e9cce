"""The inverse taken to be the identity."""

from __future__ import annotations

import attrs

from ..finiteness import require_finite
from ..tensors import Tensors
from .solver import NOT_FINITE, LinearSolution, LinearSolver, MatVec

__all__ = ["Identity"]


@attrs.frozen(kw_only=True)
class Identity(LinearSolver):
    """A^-1 taken to be I: x = b, at no product.

    The T1-T2 or DARTS approximation (Luketina et al. 2016, arXiv 1511.06727; Liu et al. 2019, arXiv 1806.09055).
    """

    damping: float = attrs.field(default=0.0, init=False, repr=False)

    def solve(self, matvec: MatVec, rhs: Tensors, *, initial: Tensors | None = None) -> LinearSolution:
        # Nothing is measured, so that the host need not wait for the device.
        require_finite(rhs, lambda _: NOT_FINITE)
        return self._solve(matvec, rhs, 0.0, initial)

    def _solve(self, matvec: MatVec, rhs: Tensors, size: float, initial: Tensors | None) -> LinearSolution:
        return LinearSolution(value=rhs)
