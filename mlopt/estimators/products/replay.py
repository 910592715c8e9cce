"""Compiled code that a GPU replays as one CUDA graph, for levels that are bound by the launch of kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import cache
from threading import Lock

import torch
from torch import Tensor

__all__ = ["Evaluate", "Operations", "Replay", "replay"]

Operations = Callable[..., Sequence[Tensor]]
Evaluate = Callable[[Sequence[Tensor]], Sequence[Tensor]]
#: The most bytes of arguments. Each is copied before a replay, and larger ones keep the GPU busy longer than a launch takes.
_MOST = 2**25
#: Held by a capture: torch allows one at a time.
_CAPTURE = Lock()


class Replay:
    """A CUDA graph of code, with the memory of its arguments and results.

    Args:
        code: operations on tensors, which returns tensors.
        kept: the first arguments, which are the same in several calls.
        vectors: the others.

    Raises:
        RuntimeError: an operation cannot be part of a CUDA graph.
    """

    def __init__(self, code: Operations, kept: Sequence[Tensor], vectors: Sequence[Tensor]) -> None:
        self._code = code
        self._kept, self._vectors = ([x.detach().clone() for x in own] for own in (kept, vectors))
        self._graph = torch.cuda.CUDAGraph()
        self._device = [*kept, *vectors][0].device
        #: The stream of the last replay.
        self._stream = torch.cuda.current_stream(self._device)
        side = _side(self._device)
        with _CAPTURE, torch.cuda.stream(side):
            side.wait_stream(self._stream)
            code(*self._kept, *self._vectors)  # libraries allocate their workspaces in a first call
            side.synchronize()
            self._results = _captured(self._graph, lambda: code(*self._kept, *self._vectors), self._device)
        self._stream.wait_stream(side)
        #: Names the point whose kept arguments are in place.
        self._point: object = None

    def at(self, kept: Sequence[Tensor]) -> Evaluate:
        """Return the code at kept arguments, as a function of the vectors."""
        point = object()

        def evaluate(vectors: Sequence[Tensor]) -> Sequence[Tensor]:
            if torch.cuda.is_current_stream_capturing():
                return self._code(*kept, *vectors)  # a graph cannot be replayed within the capture of another
            stream = torch.cuda.current_stream(self._device)
            if stream != self._stream:
                stream.wait_stream(self._stream)  # its replay may still use the memory
                self._stream = stream
            if self._point is not point:
                self._point = None  # if the copy is interrupted, no point is in place
                _copy(self._kept, kept)
                self._point = point
            _copy(self._vectors, vectors)
            self._graph.replay()
            # The next replay overwrites the results.
            results = [torch.empty_like(x) for x in self._results]
            _copy(results, self._results)
            return results

        return evaluate


def replay(code: Operations, kept: Sequence[Tensor], vectors: Sequence[Tensor]) -> Replay | None:
    """Return code as a CUDA graph; None if its arguments are large or not on one GPU, or an operation cannot be in a graph."""
    arguments = [*kept, *vectors]
    devices = {x.device for x in arguments}
    if len(devices) != 1 or not all(device.type == "cuda" for device in devices):
        return None
    if sum(x.nbytes for x in arguments) > _MOST or torch.cuda.is_current_stream_capturing():
        return None
    if any(torch.empty_like(x).stride() != x.stride() for x in arguments):
        return None  # the code is compiled for these strides, which a copy of expanded tensors does not have
    with torch.cuda.device(devices.pop()):
        try:
            return Replay(code, kept, vectors)
        except RuntimeError:
            return None  # operations that wait for the GPU; the code runs as well without a graph


@cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of all captures on a device: libraries keep a workspace for each stream that they have seen."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _captured(graph: torch.cuda.CUDAGraph, work: Callable[[], Sequence[Tensor]], device: torch.device) -> list[Tensor]:
    """Capture work on the current stream in a graph, and return its results."""
    pool = torch.cuda.graph_pool_handle()
    try:
        # Other threads may use the GPU meanwhile.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            return list(work())
        finally:
            graph.capture_end()
    except RuntimeError:
        _recover(pool, device)
        raise


def _recover(pool: tuple[int, int], device: torch.device) -> None:
    """End what a failed capture leaves open in several versions of torch.

    The allocator would serve the capture for ever, and the generator would refuse all further draws on the device.
    """
    name = "_cuda_endAllocateToPool"
    end = getattr(torch._C, name if hasattr(torch._C, name) else "_cuda_endAllocateCurrentStreamToPool")
    with contextlib.suppress(RuntimeError):  # the allocator no longer serves it
        end(device.index, pool)
    number, graph = torch.zeros((), device=device), torch.cuda.CUDAGraph()
    # A capture that succeeds sets the generator right.
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        number.zero_()
    finally:
        graph.capture_end()


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(list(targets), [x.detach() for x in sources])
