"""The inverse taken to be the identity."""

from __future__ import annotations

from typing import ClassVar

import attrs

from ..tensors import Tensors
from .solver import LinearSolution, LinearSolver, MatVec

__all__ = ["Identity"]


@attrs.frozen(kw_only=True)
class Identity(LinearSolver):
    """A^-1 taken to be I: x = b, at no product.

    The T1-T2 or DARTS approximation (Luketina et al. 2016, arXiv 1511.06727; Liu et al. 2019, arXiv 1806.09055).
    """

    damping: float = attrs.field(default=0.0, init=False, repr=False)
    _in_one: ClassVar[bool] = False

    def _solve(self, matvec: MatVec, rhs: Tensors, size: float, initial: Tensors | None) -> LinearSolution:
        return LinearSolution(value=rhs)
