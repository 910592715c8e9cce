"""Groups of processes for tests: each evaluates the same cases, and the outcomes come back by rank."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

#: Seconds after which a process that waits for another fails, and after which all are ended.
_WAIT, _END = 100, 600


def in_processes(
    size: int, work: Callable[..., Any], *arguments: Any, folder: Path, ends: Sequence[int] = (), **options: Any
) -> list[Any]:
    """Return what a function returns in each of some processes with a common group, by rank.

    Args:
        size: the number of processes.
        work: a function of a module, which new processes import.
        arguments: its arguments, as are the options.
        folder: for the rendezvous and the outcomes.
        ends: processes that may end without an outcome, which is then None.
    """
    context = multiprocessing.get_context("forkserver")
    # One import for all of them.
    context.set_forkserver_preload(["torch", "mlopt", "torch.distributed"])
    workers = [
        context.Process(
            target=_serve, args=(rank, size, str(folder), partial(work, *arguments, **options)), daemon=True
        )
        for rank in range(size)
    ]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join(_END)
    finally:
        for worker in workers:
            worker.kill()
    files = [folder / f"outcome-{rank}.pt" for rank in range(size)]
    assert all(file.exists() or rank in ends for rank, file in enumerate(files)), [w.exitcode for w in workers]
    return [torch.load(file) if file.exists() else None for file in files]


def _serve(rank: int, size: int, folder: str, work: Callable[[], Any]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    sys.stderr = open(Path(folder) / f"stderr-{rank}", "w")  # noqa: SIM115  # the process ends soon
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=_WAIT))
    torch.save(work(), Path(folder) / f"outcome-{rank}.pt")
    if dist.is_initialized():  # a case may have ended it
        dist.destroy_process_group()
