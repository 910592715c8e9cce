"""What one call costs: time, floating-point operations, peak memory."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

__all__ = ["MemoryTracker", "clock", "flops", "peak_memory"]


class MemoryTracker(TorchDispatchMode):
    """Follows the storages that operators return, from their making to their end.

    What a kernel allocates and frees within itself is not seen, nor is what was there before.

    Attributes:
        live: bytes now held.
        peak: the most that were held at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        found = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in before:
                self._follow(leaf.untyped_storage())
        return found

    def _follow(self, storage: torch.UntypedStorage) -> None:
        # Storages keep one Python object for as long as they live, so that its identity and its end are theirs.
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._ended, key, size)

    def _ended(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def peak_memory(call: Callable[[], Any], device: str) -> int:
    """Return the most bytes that a call holds beyond what there was before it."""
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
    """Adds up torch's own formulas. Its `FlopCounterMode` follows modules by hooks, which fail where a module returns a leaf."""

    total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=found)
        return found


def flops(call: Callable[[], Any]) -> int:
    """Return the floating-point operations of a call's matrix products and convolutions; nothing else is counted."""
    with _FlopCounter() as counter:
        call()
    return counter.total


def clock(device: str) -> float:
    """Return the process's CPU time, or the time at which a GPU has done what was asked of it."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
