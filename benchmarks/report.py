"""The results of a benchmark: its rows, with the commit, the versions and the machine that produced them."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["clock", "environment", "interleaved", "write"]


def _git(*arguments: str) -> str:
    """Return the output of git; nothing if there is no git, or no repository here."""
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


#: Read at the start of the benchmark, because a commit during the run would not change the running code. A plus marks
#: uncommitted changes.
_COMMIT = (_git("rev-parse", "HEAD") or "unknown") + ("+" if _git("status", "--porcelain") else "")


def environment(device: str) -> dict[str, Any]:
    """Return the commit, the date, the versions and the machine."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _COMMIT,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
    }


def interleaved(functions: Sequence[Callable[[], Any]], rounds: int, device: str, *, warm_up: int = 1) -> list[float]:
    """Return the median seconds of each function over rounds in which each runs once: CPU time, or time on a GPU.

    With interleaving, other load on the machine affects all functions alike. Report ratios of these figures, not the figures.
    """
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(warm_up + rounds):
        for function, seconds in zip(functions, times, strict=True):
            begin = clock(device)
            function()
            if turn >= warm_up:
                seconds.append(clock(device) - begin)
    return [statistics.median(seconds) for seconds in times]


def clock(device: str) -> float:
    """Return the CPU time of the process, or the time after the GPU has finished its queue."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def write(file: str | os.PathLike[str] | None, device: str, rows: Any) -> None:
    """Write the rows and the environment as JSON; do nothing if `file` is None."""
    if file is not None:
        Path(file).write_text(json.dumps({"environment": environment(device), "rows": rows}, indent=2) + "\n")
