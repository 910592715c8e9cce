"""The segments of virtual steps from one checkpoint to the next, and the memory that a traced step holds."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable

from torch import Tensor
from torch.autograd.graph import Node

__all__ = ["balanced", "bytes_of", "saved", "uniform"]


def uniform(steps: int, every: int) -> list[int]:
    """Return the lengths of segments of `every` steps each; the last one has those that are left."""
    return [min(every, steps - begin) for begin in range(0, steps, every)]


def balanced(steps: int, weight: float) -> list[int]:
    """Return the lengths of segments that together hold the least memory at a time.

    While the backward pass is in segment k, the checkpoints of the k segments before it are held, and n_k traced steps, each of
    the memory of `weight` checkpoints. Lengths with the same k + weight n_k everywhere need about sqrt(2 weight steps)
    checkpoints, where segments of equal length would need sqrt(4 weight steps).

    Args:
        steps: the number of steps.
        weight: the memory of a traced step in units of a checkpoint.
    """
    budget = max(weight, math.sqrt(2 * weight * steps) - 1)
    while True:
        lengths, left = list[int](), steps
        while left and (fitting := math.floor((budget - len(lengths)) / weight)) > 0:
            lengths.append(min(fitting, left))
            left -= lengths[-1]
        if not left:
            return lengths
        budget += 1


def saved(nodes: Iterable[Node]) -> dict[int, int]:
    """Return the bytes of each storage that the nodes of a graph hold for the backward pass, by its address."""
    storages: dict[int, int] = {}
    for node in nodes:
        for name in _names(type(node)):
            # A node that was freed, or whose tensor was changed in place, holds nothing that could be counted.
            with contextlib.suppress(RuntimeError):
                value = getattr(node, name)
                for tensor in value if isinstance(value, (tuple, list)) else (value,):
                    if isinstance(tensor, Tensor):
                        storage = tensor.untyped_storage()
                        storages[storage.data_ptr()] = storage.nbytes()
    return storages


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the components of some tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)


@functools.cache
def _names(kind: type) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_saved_") or name == "saved_tensors")
