"""Floating-point operations and peak memory of one call. (`report.clock` measures its time.)"""

from __future__ import annotations

import ctypes
import gc
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["flops", "peak_memory", "release"]


def peak_memory(call: Callable[[], Any], device: str) -> int:
    """Return the most bytes that a call holds, without those held before the call.

    On a CPU, it counts every allocation that torch's profiler records, in compiled code too.
    """
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Tensors in earlier cycles would be freed inside the call, and lower the peak.
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None
    pending = list(profiler.profiler.kineto_results.experimental_event_tree())
    sizes: list[tuple[int, int]] = []
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == _EventType.Allocation:
            sizes.append((event.start_time_ns, event.extra_fields.alloc_size))
    return max(itertools.accumulate((size for _, size in sorted(sizes)), initial=0))


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


def release() -> None:
    """Return freed memory to the system: the C library of Linux keeps the pages of freed tensors, several times the peak."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
