"""Batches as nested containers of tensors: moved to a device, and copied for one evaluation."""

from __future__ import annotations

import copy
import enum
import weakref
from collections.abc import Hashable, Iterable, Mapping, MutableMapping, Sequence
from operator import is_not
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ProblemError

__all__ = ["copied", "described", "to_device", "versions"]

#: Depth to which the attributes of an object are searched for tensors.
_DEPTH = 4
#: Kinds of values that their representation describes in full; a weak reference leads back to an object that is described anyway.
_PLAIN = (bool, int, float, complex, str, bytes, enum.Enum, range, torch.dtype, torch.device, weakref.ref)


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with every tensor in it on the device; an object with a `to` method moves itself."""
    if isinstance(batch, Tensor):
        # A copy to the CPU that does not wait could be read before it is complete. Other accelerators need not keep the source.
        return batch.to(device, non_blocking=device.type == "cuda")
    if hasattr(batch, "to"):
        # Move a shallow copy: graphs and tokenised texts move in place, and the data must stay where they are.
        return copy.copy(batch).to(device)
    if isinstance(batch, Mapping):
        moved = {key: to_device(value, device) for key, value in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return moved
        # A copy keeps the other attributes of its type.
        other = copy.copy(batch)
        other.update(moved)
        return other
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def copied(batch: Any, tensors: list[Tensor]) -> Any:
    """Return a batch whose containers are copies and whose tensors are the same, so that a loss may take entries out.

    Containers are lists, tuples, mappings, data classes, and objects with a method `to` or with tensors as attributes. Any other
    object is returned as it is.

    Args:
        batch: the batch.
        tensors: a list to which the tensors of the batch are added.

    Raises:
        ProblemError: the batch holds an iterator.
    """
    if isinstance(batch, Tensor):
        tensors.append(batch)
        return batch
    kind = type(batch)
    if batch is None:
        return None
    if kind is dict:
        return {key: copied(value, tensors) for key, value in batch.items()}
    if kind is list:
        return [copied(entry, tensors) for entry in batch]
    if isinstance(batch, tuple):
        entries = [copied(entry, tensors) for entry in batch]
        if not any(map(is_not, entries, batch)):
            return batch
        return kind(*entries) if hasattr(batch, "_fields") else kind(entries)
    fields = getattr(kind, "__attrs_attrs__", None) or getattr(batch, "__dataclass_fields__", {}).values()
    if isinstance(batch, (list, MutableMapping)):
        return _filled(batch, range(len(batch)) if isinstance(batch, list) else list(batch), tensors)
    if fields:
        other = copy.copy(batch)
        for name in (field.name for field in fields if hasattr(batch, field.name)):
            object.__setattr__(other, name, copied(getattr(batch, name), tensors))  # the class may be frozen
        return other
    if not isinstance(batch, nn.Module) and (hasattr(batch, "to") or _holds_tensors(batch)):
        _search(batch, tensors, _DEPTH)
        return copy.copy(batch)
    if hasattr(kind, "__next__"):
        raise ProblemError(
            f"its batch holds a {kind.__name__}, which one evaluation of the loss would use up, and a loss is evaluated several "
            "times on a batch; give a list of the entries, list(...)"
        )
    return batch


def _holds_tensors(batch: Any) -> bool:
    return any(isinstance(value, Tensor) for value in getattr(batch, "__dict__", {}).values())


def _filled(batch: Any, keys: Iterable[Any], tensors: list[Tensor]) -> Any:
    """Return a copy of a list or mapping of any type; entries that are not containers are left as the copy has them."""
    other = copy.copy(batch)
    for key in keys:
        entry = batch[key]
        if (own := copied(entry, tensors)) is not entry:
            other[key] = own
    return other


def _search(value: Any, tensors: list[Tensor], depth: int) -> None:
    """Add the tensors among the attributes of an object, and among theirs, to a list."""
    if isinstance(value, Tensor):
        tensors.append(value)
    elif depth and not isinstance(value, nn.Module):
        if isinstance(value, Mapping):
            entries: Iterable[Any] = value.values()
        else:
            entries = value if isinstance(value, (list, tuple)) else getattr(value, "__dict__", {}).values()
        for entry in list(entries):
            _search(entry, tensors, depth - 1)


def described(batch: Any, depth: int = _DEPTH) -> Hashable:
    """Return all that a batch holds but the numbers in its tensors: kinds, shapes, dtypes, and plain values.

    Args:
        batch: the batch.
        depth: to which attributes of objects are searched.

    Raises:
        ProblemError: it holds an object whose content is out of reach, such as an array of numpy.
    """
    if isinstance(batch, Tensor):
        return "tensor", batch.shape, batch.stride(), batch.dtype, batch.device, batch.requires_grad
    kind = type(batch)
    if batch is None or isinstance(batch, _PLAIN):
        return kind, repr(batch)  # since 1, 1.0 and True are equal, and NaN does not equal itself
    entries: Any
    if isinstance(batch, Mapping):
        entries = [(repr(key), value) for key, value in batch.items()]
    elif isinstance(batch, (list, tuple)):
        entries = list(enumerate(batch))
    elif depth and hasattr(batch, "__dict__") and not isinstance(batch, (nn.Module, type)) and not callable(batch):
        entries, depth = list(vars(batch).items()), depth - 1
    else:
        raise ProblemError(
            f"its batch holds a {kind.__name__}, whose content is out of reach; give tensors and plain numbers"
        )
    return kind, tuple([(key, described(value, depth)) for key, value in entries])


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """Return the numbers of changes in place of tensors; those made in inference mode do not count them, and have zero."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]
