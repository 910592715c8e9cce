"""Compute features of many molecules in several processes, with a progress bar."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.progress import Progress

from .graphs import import_extra

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["by_chunks"]

T = TypeVar("T")
_CHUNK = 250
#: The fewest molecules for a process: it takes seconds to start.
_SHARE = 2_500
#: The seconds after which a line says what is computed, where there is no terminal for a bar.
_PATIENCE = 5.0
#: The seconds after which an idle process ends.
_IDLE = 30


def by_chunks(function: Callable[[int, Sequence[str]], T], smiles: Sequence[str], noun: str) -> list[T]:
    """Return the results of a function on consecutive chunks of molecules, in their order.

    The number of processes changes nothing in a result, because each molecule is computed by itself.

    Args:
        function: takes the 0-based row of a chunk's first molecule and the SMILES of the chunk. It must be importable, and its
            results quick to pickle: arrays of NumPy, not tensors.
        smiles: the molecules.
        noun: the plural of what is computed, for the progress bar.

    Raises:
        Exception: an error of the function, as it was raised in a process.
    """
    joblib = import_extra("joblib")
    workers = max(1, min(joblib.cpu_count(), len(smiles) // _SHARE))
    starts = range(0, len(smiles), _CHUNK)
    # Not multiprocessing: its processes import the main script again, which then needs a guard.
    options = {"backend": "loky", "idle_worker_timeout": _IDLE} if workers > 1 else {}
    parallel = joblib.Parallel(n_jobs=workers, return_as="generator", **options)
    results = parallel(joblib.delayed(function)(start, smiles[start : start + _CHUNK]) for start in starts)
    return list(_shown(results, len(starts), f"{noun} of {len(smiles):,} molecules"))


def _shown(results: Iterator[T], count: int, task: str) -> Iterator[T]:
    """Yield results; show a bar on a terminal, and elsewhere a line at the begin and at the end of what takes long."""
    console = Console(stderr=True)
    say = partial(console.print, highlight=False, soft_wrap=True)
    begin, first, announced = time.monotonic(), 0.0, False
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(task, total=count)
        for number, result in enumerate(results, 1):
            progress.advance(bar)
            taken = time.monotonic() - begin
            first = first or taken  # the start of the processes, which the later chunks do not wait for
            if not console.is_terminal and not announced and taken > _PATIENCE and 1 < number < count:
                say(f"{task}: about {(taken - first) / (number - 1) * (count - number):.0f} seconds left")
                announced = True
            yield result
    if announced:
        say(f"{task}: done in {time.monotonic() - begin:.0f} seconds")
