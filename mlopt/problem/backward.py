"""Derivatives of a scalar that depends on sharded variables, by a plain backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ..shards import is_sharded, whole
from .estimator import Block, Vectors

__all__ = ["backward"]


def backward(
    value: Tensor, wanted: Sequence[Block], values: Vectors, *, retain_graph: bool = False
) -> dict[Block, tuple[Tensor | None, ...]]:
    """Return the derivatives of a scalar by blocks of live variables, by a backward pass whose hooks sum over processes.

    With L_r the scalar of process r, the derivatives by sharded variables are those of sum_r L_r, and sharded as they are. Those
    by whole variables are of L_r. None stands for a variable that the scalar does not use. `.grad` remains as it was.

    Args:
        value: a scalar with a graph.
        wanted: the blocks.
        values: the live variables of each block; of all blocks that the scalar depends on.
        retain_graph: as in `Tensor.backward`.
    """
    leaves = [variable for variables in values.values() for variable in variables]
    kept = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    hooks = [leaf.register_hook(partial(_placed, leaf)) for leaf in leaves if is_sharded(leaf)]  # type: ignore[no-untyped-call]
    try:
        # Hooks do not run for gradients that torch.autograd.grad or `inputs` ask for.
        value.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]
        return {block: tuple(_gradient(variable) for variable in values[block]) for block in wanted}
    finally:
        for hook in hooks:
            hook.remove()
        for leaf, gradient in zip(leaves, kept, strict=True):
            leaf.grad = gradient


def _gradient(variable: Any) -> Tensor | None:
    gradient = variable.grad
    if gradient is None:
        return None
    if not is_sharded(variable):
        return whole(gradient)  # sharded, if the variable multiplies a number of sharded ones
    # The hooks take a mean. A regularizer that reads the shards without a forward pass is divided by the number of processes.
    return gradient * float(variable.device_mesh.size())  # type: ignore[no-any-return]


def _placed(variable: Any, gradient: Any) -> Tensor:
    """Return the gradient of a regularizer in the shards of its variable, to which a unit adds that of a loss."""
    return gradient.redistribute(placements=variable.placements).clone()  # type: ignore[no-any-return]
