"""The partial derivatives of a level's objective, from the value of its loss."""

from __future__ import annotations

from torch import Tensor

from ..errors import ProblemError
from ..finiteness import require_finite
from ..tensors import Tensors
from .estimator import Block
from .level import Level
from .point import Point
from .term import cut, derivatives

__all__ = ["partial_derivatives", "partial_pieces"]


def partial_derivatives(point: Point, level: Level, loss: Tensor) -> dict[Block, Tensors]:
    """Return the derivatives of a level's objective with respect to its own variables and the solutions it depends on.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
        ProblemError: the loss depends on no variable of the level or of those solved inside it.
    """
    require_finite((), lambda value: f"the loss of level {level.name!r} is {value}", size=loss.detach())
    ranks, values = point.problem.ranks, point.values
    if not ranks.several:
        return partial_pieces(point, level, loss)
    blocks = _depends_on(point, level)

    def flat() -> list[Tensor]:
        pieces = partial_pieces(point, level, loss)
        return [piece for block in blocks for piece in pieces[block]]

    return cut(ranks.together(flat, [variable for block in blocks for variable in values[block]]), blocks, values)


def partial_pieces(point: Point, level: Level, loss: Tensor) -> dict[Block, Tensors]:
    """Return the same for the piece of this process, not summed over processes, and without a test of the loss."""
    if not loss.requires_grad:
        raise ProblemError(
            f"the loss of level {level.name!r} does not depend on its variables: was it computed under no_grad, or detached?"
        )
    return derivatives(loss, _depends_on(point, level), point.values)


def _depends_on(point: Point, level: Level) -> list[Block]:
    node = point.problem.graph[level.name]
    return [level.name, *(name for name in node.interior if name in node.references)]
