"""Refusals of modules whose parameters are not ordinary tensors of this process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import ProblemError
from ..ranks import Ranks
from ..shards import is_sharded, local

if TYPE_CHECKING:
    from .level import Level

__all__ = ["refuse_module", "refuse_shared_memory"]

#: Wrappers that exchange gradients between processes by hooks of their own.
_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel"}


def refuse_module(level: Level, ranks: Ranks) -> None:
    """Raise if a level's module is replicated by a wrapper, or has parameters or buffers without a shape.

    Sharded parameters are for several processes, and are checked with their level.

    Raises:
        ProblemError: it is such a module.
    """
    for name, module in level.module.named_modules():
        place = f"level {level.name!r}: its module" + (f" {name!r}" if name else "")
        if _WRAPPERS.intersection(_classes(module)):
            raise ProblemError(
                f"{place} is a {type(module).__name__}, which exchanges gradients between processes by hooks that hypergradients "
                "do not reach; give the module that it wraps: the processes of a group share every problem"
            )
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            if is_lazy(tensor):
                raise ProblemError(
                    f"{place} is lazy, and {key!r} has no shape yet; call it on a batch before the problem is built, or give its "
                    "sizes"
                )
            if is_sharded(tensor) and not ranks.several:
                raise ProblemError(
                    f"{place} has {key!r} sharded over processes (a DTensor of fully_shard), and the problem belongs "
                    "to this process alone; give the module before it is sharded, or a group"
                )


def refuse_shared_memory(levels: Iterable[Level]) -> None:
    """Raise if two variables, or two entries of one, are the same numbers in memory: a write to one would move the other.

    Raises:
        ProblemError: there are such variables.
    """
    owners: dict[object, str] = {}
    for level in levels:
        for name, parameter in zip(level.parameter_names, level.parameters, strict=True):
            place = f"{level.name}.{name}"
            if any(size > 1 and step == 0 for size, step in zip(parameter.shape, parameter.stride(), strict=True)):
                raise ProblemError(
                    f"{place} is an expanded tensor, several entries of which are one number in memory; give a copy (clone), or "
                    "a smaller parameter that the module expands"
                )
            (memory,) = local((parameter,))
            if not memory.numel() or memory.is_meta:
                continue
            key = (memory.device, memory.data_ptr())
            if key in owners:
                raise ProblemError(
                    f"{owners[key]} and {place} are two parameters on the same memory, so that a step of one moves the other; "
                    "give one of them a copy (clone), or register one parameter in both places"
                )
            owners[key] = place


def _classes(value: nn.Module) -> set[str]:
    """Return the names of the classes of a module; the classes themselves would have to be imported."""
    return {kind.__name__ for kind in type(value).__mro__}
