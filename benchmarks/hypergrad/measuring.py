"""Floating-point operations and peak memory of one call. (`report.clock` measures its time.)"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

__all__ = ["MemoryTracker", "flops", "peak_memory"]


class MemoryTracker(TorchDispatchMode):
    """Track the storages that operators return, from allocation to release.

    Memory that a kernel allocates and frees internally is not counted; neither are storages that existed before.

    Attributes:
        live: bytes held now.
        peak: the most bytes held at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A storage keeps one Python object for its lifetime, so the id and the finalizer of that object identify the storage.
        before = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = function(*args, **(kwargs or {}))
        storages = {id(s): s for s in (t.untyped_storage() for t in tree_leaves(result) if isinstance(t, Tensor))}
        for key in storages.keys() - before:
            self._follow(storages[key])
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._ended, size)

    def _ended(self, size: int) -> None:
        self.live -= size


def peak_memory(call: Callable[[], Any], device: str) -> int:
    """Return the most bytes that a call holds, without those held before the call."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with MemoryTracker() as tracker:
        call()
    return tracker.peak


class _FlopCounter(TorchDispatchMode):
    """Sum torch's own formulas. Its `FlopCounterMode` uses module hooks, which fail if a module returns a leaf."""

    total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def flops(call: Callable[[], Any]) -> int:
    """Return the floating-point operations of the matrix products and convolutions in a call; other operators are not counted."""
    with _FlopCounter() as counter:
        call()
    return counter.total
