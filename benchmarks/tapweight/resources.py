"""Seconds and peak memory of a part of a run."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

import attrs
import torch

__all__ = ["Used", "measured"]

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@attrs.define
class Used:
    """The time and the memory of a part of a run.

    Attributes:
        seconds: CPU time of the process, or time on a GPU.
        memory: the most MiB held at once: of the whole process on a CPU, of tensors on a GPU; None where it is not known.
    """

    seconds: float = 0.0
    memory: float | None = None


@contextlib.contextmanager
def measured(device: str) -> Iterator[Used]:
    """Measure what the block uses; the numbers are there after the block."""
    used = Used()
    cpu = device == "cpu"
    if cpu:
        known = _reset()
    else:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    clock = time.process_time if cpu else time.perf_counter
    begin = clock()
    yield used
    if not cpu:
        torch.cuda.synchronize(device)
    used.seconds = clock() - begin
    if not cpu:
        used.memory = torch.cuda.max_memory_allocated(device) / 2**20
    elif known and (peak := re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())):
        used.memory = int(peak[1]) / 2**10


def _reset() -> bool:
    """Reset the peak of the process's memory; return False where the system has no such counter."""
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True
