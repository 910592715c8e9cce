"""Evaluation of a point's losses in double precision, whatever the dtype of their variables and constants."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from ...problem import Point, standing_in
from .full_precision import full_precision

__all__ = ["in_double_precision"]


@contextmanager
def in_double_precision(point: Point) -> Iterator[None]:
    """Let copies in float64 stand in for all variables at a point, and promote every operation on them to float64.

    A loss need not know: constants in another dtype are promoted where they meet a tensor in float64, and casts to a coarser
    dtype have no effect. Variables that are in float64 already stay as they are.
    """
    levels = {level.name: level for level in point.problem}
    before = dict(point.values)
    device = next(iter(before.values()))[0].device
    with ExitStack() as stack:
        for block, values in before.items():
            if all(value.dtype == torch.float64 for value in values):
                continue
            leaves = [_widened(value) for value in values]
            if block in levels:
                stack.enter_context(standing_in(point, levels[block], leaves))
            else:
                stack.callback(point.values.__setitem__, block, values)
                point.values[block] = tuple(leaves)
        stack.enter_context(full_precision(device))
        stack.enter_context(_Promotion())  # type: ignore[no-untyped-call]
        yield


def _widened(value: Tensor) -> nn.Parameter:
    """Return a leaf in float64 with the hooks of a variable."""
    leaf = nn.Parameter(value.detach().double())
    for hook in (value._backward_hooks or {}).values():
        leaf.register_hook(hook)  # type: ignore[no-untyped-call]
    return leaf


class _Promotion(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Promotes operations with an argument in float64 to float64, in forward and backward passes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        if not any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in tree_leaves(given)):
            return func(*args, **(kwargs or {}))
        copies: list[tuple[Tensor, Tensor]] = []

        def promote(x: Any) -> Any:
            if isinstance(x, torch.dtype):
                return torch.float64 if x.is_floating_point else x
            if isinstance(x, Tensor) and x._is_zerotensor():
                # Forward mode's zeros without storage: kernels that run below functorch's transforms read past it.
                return torch.zeros(x.shape, dtype=torch.float64 if x.is_floating_point() else x.dtype, device=x.device)
            if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64:
                copies.append((x, x.double()))
                return copies[-1][1]
            return x

        args, kwargs = tree_map(promote, given)
        result = func(*args, **kwargs)
        if not copies or not func._schema.is_mutable:
            return result
        for original, copied in copies:
            original.copy_(copied)
        originals = {id(copied): original for original, copied in copies}
        return tree_map_only(Tensor, lambda x: originals.get(id(x), x), result)
