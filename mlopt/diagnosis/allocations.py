"""The memory of tensors that operations allocate, as they run."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Allocations"]


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operations make inside the context; memory inside a kernel is not seen.

    Attributes:
        held: the bytes of those that are alive.
        peak: the most that were alive at a time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held: int = 0
        self.peak: int = 0
        self._alive: set[int] = set()

    def restart(self) -> int:
        """Return the peak, and measure it from the present on."""
        peak, self.peak = self.peak, self.held
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given: set[int] | None = None
        for tensor in tree_leaves(result):
            if not _has_storage(tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._alive or not size:
                continue
            if given is None:
                given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if _has_storage(x)}
            if key not in given:
                self._alive.add(key)
                self.held += size
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self._free, key, size)
        return result

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.held -= size


def _has_storage(value: Any) -> bool:
    """Return True for a tensor with memory; sparse ones keep theirs in parts, and the zeros of forward mode have none."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not value._is_zerotensor()
