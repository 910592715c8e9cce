"""Central differences of a term's first derivatives along a direction, at any step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ...problem import Block, Term, Vectors
from ...tensors import Tensors, add, axpy, norm, overwrite, scale, subtract
from .full_precision import full_precision

__all__ = ["Difference", "relative_step"]

#: Relative size of a finite-difference displacement, ||step * direction|| / ||variables||. Central differences err by
#: the square of it and by rounding over it; measured on small networks, 1e-2 is off by 12% in float32 and 1e-3 by under 1%.
_RELATIVE_STEP = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


def relative_step(variables: Sequence[Tensor]) -> float:
    """Return the displacement for a difference, relative to the norm of the variables; the coarsest dtype decides."""
    return max(_RELATIVE_STEP.get(variable.dtype, 1e-3) for variable in variables)


def _wide(size: Tensor) -> Tensor:
    """Return a norm in a dtype fit for a step: in half precision, a step would be rounded differently on the way back."""
    return size.float() if size.dtype in (torch.bfloat16, torch.float16) else size


class Difference:
    """(g(x + h v) - g(x - h v)) / 2h, with g the first derivatives of a term by the wanted blocks, and v a direction.

    Autocast and TF32 are disabled inside: their rounding would be divided by the step.

    Args:
        term: the term.
        direction: v, by block.
        wanted: the blocks to differentiate by.
        chosen: indices of the variables to move, in the order of the direction's blocks; all if None.
    """

    def __init__(
        self, term: Term, direction: Vectors, wanted: Sequence[Block], chosen: Sequence[int] | None = None
    ) -> None:
        self._term, self._wanted = term, wanted
        moved = [variable for block in direction for variable in term.values[block]]
        along = [vector for block in direction for vector in direction[block]]
        chosen = range(len(moved)) if chosen is None else chosen
        self.moved, self.along = ([vectors[k] for k in chosen] for vectors in (moved, along))
        self.relative_step = relative_step(self.moved)

    def reach(self) -> Tensor:
        """Return the norm of the variables that move."""
        return _wide(norm([v.detach() for v in self.moved]))

    def step(self, reach: Tensor) -> Tensor:
        """Return the step h that moves variables of the norm `reach` by a fraction of it that suits their dtype."""
        # The step stays on the device. Along a zero direction both sides are equal for any step.
        size = _wide(norm(self.along))
        return self.relative_step * reach / torch.where(size > 0, size, 1.0)

    def __call__(self, step: Tensor, kept: Sequence[Block] = ()) -> dict[Block, Tensors]:
        """Return the central difference at a step; keep the means of both sides, which are g in the middle, for some blocks."""
        above, below = self._sides(step)
        self.kept = {block: scale(0.5, add(above[block], below[block])) for block in kept}
        return {block: scale(0.5 / step, subtract(above[block], below[block])) for block in self._wanted}

    def one_sided(self, step: Tensor) -> tuple[dict[Block, Tensors], dict[Block, Tensors]]:
        """Return the differences between each side and the present point; they agree where g is smooth."""
        middle = self.middle
        above, below = self._sides(step)
        ahead = {block: scale(1.0 / step, subtract(above[block], middle[block])) for block in self._wanted}
        behind = {block: scale(1.0 / step, subtract(middle[block], below[block])) for block in self._wanted}
        return ahead, behind

    @cached_property
    def middle(self) -> dict[Block, Tensors]:
        """The first derivatives at the present point."""
        with full_precision(self.moved[0].device):
            return self._term.derivatives(self._wanted)

    def _sides(self, step: Tensor) -> tuple[dict[Block, Tensors], dict[Block, Tensors]]:
        """Return the first derivatives on both sides; restore the variables from copies."""
        live = [variable.data for variable in self.moved]
        kept = [variable.clone() for variable in live]
        try:
            with full_precision(live[0].device):
                overwrite(live, axpy(step, self.along, kept))
                above = self._term.derivatives(self._wanted)
                overwrite(live, axpy(-step, self.along, kept))
                return above, self._term.derivatives(self._wanted)
        finally:
            overwrite(live, kept)
