"""The variables of another level, or of a part of its module, that virtual steps use: their start, their learning rates."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from ..errors import EstimatorError
from ..problem import Block, Point
from ..tensors import Tensors

__all__ = ["Referred", "level_of"]


def level_of(place: str) -> str:
    """Return the level in the name of a level or of a part of its module, such as "meta" in "meta.rates"."""
    return place.partition(".")[0]


@attrs.frozen(eq=False)
class Referred:
    """Variables of another level.

    Attributes:
        label: the level and the option of the estimator that name them, for errors.
        level: the level.
        variables: the variables.
        positions: their positions among those of the level.
    """

    label: str
    level: str
    variables: Tensors
    positions: tuple[int, ...]

    @classmethod
    def of(cls, place: str, option: str, point: Point, user: str) -> Referred:
        """Return the variables that an option of an estimator names.

        Args:
            place: a level, or a level and a submodule of its module.
            option: the option, for errors.
            point: the point.
            user: the level of the estimator.

        Raises:
            EstimatorError: the loss does not refer to the level, there is no such submodule, or it and the level of the estimator
                are not parametrized alike.
        """
        label = f"level {user!r}: Unrolled({option}={place!r})"
        level, _, path = place.partition(".")
        if level not in point.problem.graph[user].arguments:
            raise EstimatorError(
                f"{label}, but its loss does not refer to {level!r}; make it one of the loss's keyword-only parameters"
            )
        module = point.problem[level].module
        try:
            part = module.get_submodule(path)
        except AttributeError as error:
            raise EstimatorError(
                f"{label}, but the module of level {level!r} has no submodule {path!r} ({error}); it has "
                f"{', '.join(repr(name) for name, _ in module.named_children())}"
            ) from error
        # The parameters of equal modules correspond, also where both map them to other values.
        own_map = option == "start" and any(map(is_parametrized, point.problem[user].module.modules()))
        if any(map(is_parametrized, part.modules())) != own_map:
            raise EstimatorError(
                f"{label} takes parameters as they are, and parametrizations (torch.nn.utils.parametrize) map those of "
                f"{repr(user) if own_map else repr(place)} to other values; use modules without them, or the same for a start "
                "and its level"
            )
        own = {id(parameter) for parameter in part.parameters()}
        positions = tuple(k for k, variable in enumerate(point.problem[level].parameters) if id(variable) in own)
        if not positions:
            raise EstimatorError(
                f"{label}, which has no trainable parameters; they are variables of level {level!r} if requires_grad is True"
            )
        return cls(label, level, tuple(point.values[level][k] for k in positions), positions)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the variables."""
        return [tuple(x.shape) for x in self.variables]

    def as_start(self, variables: Sequence[Tensor]) -> Tensors:
        """Return copies of the variables in the shapes of those that start there, which may be stacked.

        Raises:
            EstimatorError: the shapes differ.
        """
        own = [tuple(x.shape) for x in variables]
        if self.shapes not in (own, [shape[1:] for shape in own]):
            raise EstimatorError(
                f"{self.label}, whose parameters have shapes {self.shapes}, not {own}; use modules of the same kind for both "
                "levels, of which this one may be stacked"
            )
        # Copies: differences move the variables of the start in place, too.
        pairs = zip(self.variables, variables, strict=True)
        return tuple(x.detach().to(y).expand_as(y).clone(memory_format=torch.contiguous_format) for x, y in pairs)

    def as_rates(self, variables: Sequence[Tensor]) -> Tensors:
        """Return the variables as factors on the steps of others.

        Raises:
            EstimatorError: the shapes do not expand to those of the others.
        """
        own = [tuple(x.shape) for x in variables]
        if len(own) != len(self.shapes) or not all(map(_expands, self.shapes, own)):
            raise EstimatorError(
                f"{self.label}, whose parameters have shapes {self.shapes}, which do not expand to {own}; give one for each, "
                "of its shape or ()"
            )
        return tuple(rate.detach() for rate in self.variables)

    def add_into(self, total: dict[Block, Tensors], vectors: Tensors) -> None:
        """Add vectors in the shapes of the variables to a sum over blocks, if it holds the level."""
        if self.level in total:
            entries = list(total[self.level])
            for k, vector in zip(self.positions, vectors, strict=True):
                entries[k] = entries[k] + vector
            total[self.level] = tuple(entries)


def _expands(shape: tuple[int, ...], own: tuple[int, ...]) -> bool:
    """Return True if a tensor of one shape expands to another."""
    return len(shape) <= len(own) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(own), strict=False))
