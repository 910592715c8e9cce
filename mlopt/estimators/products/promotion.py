"""Evaluation of a point's losses in a finer precision, whatever the dtype of their variables and constants."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from ...errors import EstimatorError
from ...problem import Block, Point, Vectors, standing_in
from ...shards import any_sharded
from ...tensors import Tensors
from .full_precision import full_precision

__all__ = ["Copies", "has_half", "in_single_precision", "promoted"]

#: Copies of variables by block.
Copies: TypeAlias = dict[Block, Sequence[nn.Parameter]]


def has_half(point: Point) -> bool:
    """Return True if a variable at a point is in half precision."""
    return any(value.dtype in (torch.bfloat16, torch.float16) for values in point.values.values() for value in values)


@contextmanager
def promoted(point: Point, dtype: torch.dtype = torch.float64, kept: Copies | None = None) -> Iterator[None]:
    """Let copies in a dtype stand in for all coarser variables at a point, and promote every operation on them to it.

    A loss need not know: constants in a coarser dtype are promoted where they meet a tensor in that dtype, and casts to a coarser
    one have no effect. Variables that are as fine already stay as they are.

    Args:
        point: the point.
        dtype: float64 or float32.
        kept: the copies by block, for several contexts to use the same; graphs refer to them.
    """
    if any(any_sharded(values) for values in point.values.values()):
        with _unpromoted(point, dtype):
            yield
        return
    levels = {level.name: level for level in point.problem}
    before, kept = dict(point.values), {} if kept is None else kept
    device = next(iter(before.values()))[0].device
    with ExitStack() as stack:
        for block, values in before.items():
            if not any(_is_coarser(value.dtype, dtype) for value in values):
                continue
            if block not in kept:
                kept[block] = [_widened(value, dtype) for value in values]
            if block in levels:
                stack.enter_context(standing_in(point, levels[block], kept[block]))
            else:
                stack.callback(point.values.__setitem__, block, values)
                point.values[block] = tuple(kept[block])
        stack.enter_context(full_precision(device))
        stack.enter_context(_Promotion(dtype))
        yield


@contextmanager
def _unpromoted(point: Point, dtype: torch.dtype) -> Iterator[None]:
    """Evaluate sharded variables as they are, if they are as fine: a module gathers its own parameters, and no copies."""
    if any(_is_coarser(value.dtype, dtype) for values in point.values.values() for value in values):
        raise EstimatorError(f"sharded variables have no copies in {dtype}")
    with full_precision(next(iter(point.values.values()))[0].device):
        yield


def in_single_precision(
    point: Point, kept: Copies | None, function: Callable[[Vectors], dict[Block, Tensors]], vectors: Vectors
) -> dict[Block, Tensors]:
    """Return a function of vectors over the variables, evaluated at copies of half-precision ones in single precision.

    Second derivatives that are evaluated in half precision can be off by several per cent.

    Args:
        point: the point.
        kept: the copies, as in `promoted`; if None, there are none, and the function is evaluated as it is.
        function: takes vectors by block, and returns such.
        vectors: its argument, in the dtypes of the variables, as is the result.
    """
    if kept is None:
        return function(vectors)
    with promoted(point, torch.float32, kept):
        result = function({block: _like(x, point.values[block]) for block, x in vectors.items()})
    return {block: _like(x, point.values[block]) for block, x in result.items()}


def _like(vectors: Sequence[Tensor], variables: Sequence[Tensor]) -> Tensors:
    return tuple(x.to(v.dtype) for x, v in zip(vectors, variables, strict=True))


def _is_coarser(kind: torch.dtype, dtype: torch.dtype) -> bool:
    return kind.is_floating_point and kind.itemsize < dtype.itemsize


def _widened(value: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """Return a leaf in a dtype, if it is finer, with the hooks of a variable."""
    leaf = nn.Parameter(value.detach().to(dtype if _is_coarser(value.dtype, dtype) else value.dtype, copy=True))
    for hook in (value._backward_hooks or {}).values():
        leaf.register_hook(hook)  # type: ignore[no-untyped-call]
    return leaf


class _Promotion(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Promotes operations with an argument in a dtype to that dtype, in forward and backward passes."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        dtype = self._dtype
        if not any(isinstance(x, Tensor) and x.dtype == dtype for x in tree_leaves(given)):
            return func(*args, **(kwargs or {}))
        copies: list[tuple[Tensor, Tensor]] = []

        def promote(x: Any) -> Any:
            if isinstance(x, torch.dtype):
                return dtype if _is_coarser(x, dtype) else x
            if isinstance(x, Tensor) and x._is_zerotensor():
                # Forward mode's zeros without storage: kernels that run below functorch's transforms read past it.
                return torch.zeros(x.shape, dtype=dtype if _is_coarser(x.dtype, dtype) else x.dtype, device=x.device)
            if isinstance(x, Tensor) and _is_coarser(x.dtype, dtype):
                copies.append((x, x.to(dtype)))
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
