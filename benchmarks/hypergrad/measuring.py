"""Floating-point operations and peak memory of one call. (`report.clock` measures its time.)"""

from __future__ import annotations

import ctypes
import gc
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
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None
    pending = list(profiler.profiler.kineto_results.experimental_event_tree())
    events: list[tuple[int, int, int]] = []
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == _EventType.Allocation:
            events.append((event.start_time_ns, event.extra_fields.alloc_size, event.extra_fields.ptr))
    held, own, most = 0, set[int](), 0
    for _, size, address in sorted(events):
        if size > 0:
            own.add(address)
        elif address not in own:
            continue  # it was held before the call: torch knows sizes from an earlier profile
        else:
            own.remove(address)
        held += size
        most = max(most, held)
    return most


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
