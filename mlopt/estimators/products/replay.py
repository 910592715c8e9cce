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
        vectors: the others, which are contiguous.

    Raises:
        RuntimeError: an operation cannot be part of a CUDA graph.
    """

    def __init__(self, code: Operations, kept: Sequence[Tensor], vectors: Sequence[Tensor]) -> None:
        self._code = code
        #: The memory of the arguments; that of an expanded tensor is its own, which is less.
        self._kept, self._vectors = [_distinct(x).clone() for x in kept], [x.detach().clone() for x in vectors]
        arguments = [*(own.expand(x.shape) for own, x in zip(self._kept, kept, strict=True)), *self._vectors]
        self._graph = torch.cuda.CUDAGraph()
        self._device = arguments[0].device
        #: The stream of the last replay.
        self._stream = torch.cuda.current_stream(self._device)
        side = _side(self._device)
        with _CAPTURE, torch.cuda.stream(side):
            side.wait_stream(self._stream)
            code(*arguments)  # libraries allocate their workspaces in a first call
            side.synchronize()
            self._results = _captured(self._graph, lambda: code(*arguments), self._device)
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
                _copy(self._kept, [_distinct(x) for x in kept])
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
    device = _gpu([*kept, *vectors])
    arguments = [*map(_distinct, kept), *vectors]
    if device is None or torch.cuda.is_current_stream_capturing() or sum(x.nbytes for x in arguments) > _MOST:
        return None
    if not all(map(_dense, arguments)):
        return None  # the code is compiled for these strides, which a copy does not have
    with torch.cuda.device(device):
        try:
            return Replay(code, kept, vectors)
        except RuntimeError:
            return None  # operations that wait for the GPU; the code runs as well without a graph


def _gpu(arguments: Sequence[Tensor]) -> torch.device | None:
    """Return the GPU that holds all arguments; None if there is not one."""
    devices = {x.device for x in arguments}
    return devices.pop() if len(devices) == 1 and all(device.type == "cuda" for device in devices) else None


def _distinct(x: Tensor) -> Tensor:
    """Return the part of an expanded tensor that has memory of its own; what an L2 term adds to a Hessian is such a tensor."""
    return x.detach()[tuple([slice(1) if stride == 0 else slice(None) for stride in x.stride()])]


def _dense(x: Tensor) -> bool:
    """Return True if a clone has the same strides."""
    pairs = zip(x.shape, x.stride(), torch.empty_like(x).stride(), strict=True)
    return all(own == other for size, own, other in pairs if size > 1)


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
