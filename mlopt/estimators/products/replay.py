"""Compiled code that a GPU replays as one CUDA graph, for levels that are bound by the launch of kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Evaluate", "Operations", "Replay", "replay"]

Operations = Callable[..., Sequence[Tensor]]
Evaluate = Callable[[Sequence[Tensor]], Sequence[Tensor]]
#: The most bytes of arguments. Each is copied before a replay, and larger ones keep the GPU busy longer than a launch takes.
_MOST = 2**25


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
        self._kept, self._vectors = [x.clone() for x in kept], [x.clone() for x in vectors]
        self._graph = torch.cuda.CUDAGraph()
        arguments = [*self._kept, *self._vectors]
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(here)
        with torch.cuda.stream(side):
            code(*arguments)  # libraries allocate their workspaces in a first call
            side.synchronize()
            # Other threads may use the GPU meanwhile.
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._results = list(code(*arguments))
            finally:
                self._graph.capture_end()
        here.wait_stream(side)
        #: Names the point whose kept arguments are in place.
        self._point: object = None

    def at(self, kept: Sequence[Tensor]) -> Evaluate:
        """Return the code at kept arguments, as a function of the vectors."""
        point = object()

        def evaluate(vectors: Sequence[Tensor]) -> Sequence[Tensor]:
            if torch.cuda.is_current_stream_capturing():
                return self._code(*kept, *vectors)  # a graph cannot be replayed within the capture of another
            if self._point is not point:
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
    if any(x.clone().stride() != x.stride() for x in arguments):
        return None  # the code is compiled for these strides, which a copy of expanded tensors does not have
    with torch.cuda.device(devices.pop()):
        try:
            return Replay(code, kept, vectors)
        except RuntimeError:
            return None  # operations that wait for the GPU; the code runs as well without a graph


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(list(targets), [x.detach() for x in sources])
