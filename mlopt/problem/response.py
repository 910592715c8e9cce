"""The interface of a response: a rule that differentiates an outer level's objective without pullbacks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..tensors import Tensors

if TYPE_CHECKING:
    from .point import Point
    from .problem import Problem
    from .stream import Stream

__all__ = ["Response"]


class Response(ABC):
    """A rule for the total derivative of a level's objective, responses of the levels inside included, in one piece.

    A hypergradient is the sum of pullbacks by the estimators of the levels inside, unless the level has a response.

    Example:
        >>> isinstance(mlopt.RealSteps(), mlopt.Response)
        True
    """

    @abstractmethod
    def total_derivative(self, point: Point, level: str, streams: Mapping[str, Stream]) -> Tensors:
        """Return the total derivative in the shapes of the level's variables; add its report to the point's.

        Nothing moves but the streams. The generators may move; the caller restores them.

        Args:
            point: the variables, the level's batch, and the state of the generators for its evaluation.
            level: the name of the level.
            streams: batches of the levels inside.
        """

    @abstractmethod
    def cost(self, problem: Problem) -> dict[str, int]:
        """Return, for each level inside the outermost, the number of its steps that one hypergradient takes."""
