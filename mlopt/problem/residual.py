"""Residuals: their only place of evaluation, and the term by which products with their derivatives are taken."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ProblemError
from ..tensors import Tensors, dot
from .batch import copied
from .estimator import Block, Vectors
from .inspection import Inspection
from .term import LevelTerm

if TYPE_CHECKING:
    from .level import Level
    from .point import Point
    from .workspace import Workspace

__all__ = ["ResidualTerm", "evaluate_residual"]


def evaluate_residual(
    level: Level,
    modules: Mapping[str, nn.Module],
    batch: Any,
    variables: Mapping[str, Tensor],
    workspace: Workspace | None = None,
    *,
    inspected: Iterable[Level] = (),
) -> Tensors:
    """Return the residual of a level, a tensor for each variable. Every evaluation in the library is made by this function.

    Args:
        level: a level with a residual.
        modules: by name, the level's module and those of the levels that its residual refers to.
        batch: the batch. The residual receives a copy of its containers.
        variables: the variables of the level, by parameter name.
        workspace: counts the evaluations that are inspected.
        inspected: all levels of the problem, for an evaluation on the live modules, which is then inspected.

    Raises:
        ProblemError: the residual does not have the shapes and dtypes of the variables or has no graph, changed a tensor of the
            batch or a variable in place, or depends on a level that it does not declare; or the batch holds an iterator.
    """
    others = {name: modules[name] for name in level.loss_references}
    tensors: list[Tensor] = []
    try:
        batch = copied(batch, tensors)
    except ProblemError as error:
        raise ProblemError(f"level {level.name!r}: {error}") from None
    inspection = None
    if inspected and workspace is not None:
        inspection = Inspection(level, "residual", inspected, workspace, tensors)
    value = level.definition(modules[level.name], batch, **others)
    residual = _read(value, level, variables)
    if inspection is not None:
        if torch.is_grad_enabled() and not any(entry.requires_grad for entry in residual):
            raise ProblemError(
                f"the residual of level {level.name!r} does not depend on variables: was it computed under no_grad, or detached? "
                "A residual that is itself a gradient needs create_graph=True"
            )
        # Only a search reads the value, through its graph.
        inspection(dot(residual, [torch.ones_like(x) for x in residual]) if inspection.searches else residual[0])
    return residual


def _read(value: Any, level: Level, variables: Mapping[str, Tensor]) -> Tensors:
    """Return what a residual returned as a tuple in the order of the variables, checked."""
    label = f"the residual of level {level.name!r}"
    expected = ", ".join(f"{name}: {tuple(v.shape)}" for name, v in variables.items())
    if isinstance(value, Tensor):
        value = (value,)
    elif isinstance(value, Mapping):
        if set(value) != set(variables):
            raise ProblemError(
                f"{label} returned a mapping with {', '.join(map(repr, value)) or 'nothing'}; it must hold a tensor for each "
                f"variable ({expected})"
            )
        value = [value[name] for name in variables]
    if not isinstance(value, Sequence) or not all(isinstance(entry, Tensor) for entry in value):
        raise ProblemError(
            f"{label} is a {type(value).__name__}; it must be a tensor, a sequence of tensors, or a mapping by parameter "
            f"name, in the shapes of the variables ({expected})"
        )
    if len(value) != len(variables):
        raise ProblemError(
            f"{label} returned {len(value)} tensors; it must return one for each of the {len(variables)} variables ({expected})"
        )
    for (name, variable), entry in zip(variables.items(), value, strict=True):
        if entry.shape != variable.shape:
            raise ProblemError(
                f"{label} has shape {tuple(entry.shape)} for {name!r}; it must have that of the variable, "
                f"{tuple(variable.shape)}"
            )
        rounded = torch.is_autocast_enabled(entry.device.type) and entry.is_floating_point()
        if entry.dtype != variable.dtype and not rounded:
            raise ProblemError(
                f"{label} is of {entry.dtype} for {name!r}; it must be of {variable.dtype}, as the variable"
            )
        if entry.device != variable.device:
            raise ProblemError(
                f"{label} is on {entry.device} for {name!r}; it must be on {variable.device}, as the variable"
            )
    return tuple(entry.to(variable.dtype) for entry, variable in zip(value, variables.values(), strict=True))


class ResidualTerm(LevelTerm):
    """<m, F(x, u)>, with F the residual of a level and m a multiplier in the shapes of its variables.

    It is linear in m, so its derivative by m is F, and the products of its second derivatives are those of the first ones of F:
    d/dw <grad_m, q> = F_w^T q, and d/dm <grad_x, t> = F_x t. They do not depend on the value of m.

    Args:
        point: the point of evaluation, which receives the multiplier as a block.
        level: a level with a residual.
        batches: the batch of each level; the point's if None.
        sign: a factor, -1.0 for a level whose optimiser maximises.

    Attributes:
        multiplier: the block of m.
    """

    def __init__(self, point: Point, level: Level, batches: Mapping[str, Any] | None = None, sign: float = 1.0) -> None:
        super().__init__(point, level, "residual", batches, sign)
        self.multiplier: Block = (level.name, level.name)
        if self.multiplier not in point.values:
            point.values[self.multiplier] = tuple(_drawn(v) for v in point.values[level.name])
        self.blocks = self.blocks | {self.multiplier}
        self._names = level.parameter_names

    def function(self, values: Vectors) -> Tensor:
        along = values.get(self.multiplier, self.values[self.multiplier])
        levels = {block: vectors for block, vectors in values.items() if block != self.multiplier}
        return self._pure(levels, lambda modules: self._signed(dot(along, self._residual(modules))))

    def is_mixed(self, direction: Collection[Block], wanted: Sequence[Block]) -> bool:
        return False

    def _total(self, modules: Mapping[str, nn.Module]) -> Tensor:
        return self._signed(dot(self.values[self.multiplier], self._residual(modules)))

    def _residual(self, modules: Mapping[str, nn.Module]) -> Tensors:
        self.point.generators[self.name].restore()
        batch, workspace = self._batches[self.name], self.point.workspace
        variables = dict(zip(self._names, self.values[self.name], strict=True))
        return evaluate_residual(self._level, modules, batch, variables, workspace, inspected=self._inspected(modules))


def _drawn(variable: Tensor) -> Tensor:
    """Return a leaf of random numbers in the shape of a variable, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(variable.shape, generator=generator, dtype=torch.float64, device="cpu")
    return noise.to(variable).detach().requires_grad_()
