"""Tensors that are sharded over processes (DTensors, as `fully_shard` makes them), and the modules that hold them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = [
    "any_sharded",
    "gathered",
    "is_sharded",
    "largest",
    "local",
    "reshard",
    "sharded_as",
    "total",
    "units",
    "whole",
    "whole_values",
]


def is_sharded(tensor: Any) -> bool:
    """Return True for a DTensor."""
    # An import would take long, and a process that has not made it has no DTensor.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def any_sharded(tensors: Iterable[Any]) -> bool:
    """Return True if one of some tensors is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not dist.is_initialized():  # without a group of processes there is none
        return False
    return any(isinstance(tensor, module.DTensor) for tensor in tensors)


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the shards of this process, which share memory with the tensors; a whole tensor is returned as it is."""
    return [_shard(x) if is_sharded(x) else x for x in tensors]


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor whole, by an exchange that all processes make; a whole tensor is returned as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole_values(state: Any, *, kept: bool) -> Any:
    """Return a tree with whole tensors on the CPU in place of sharded ones, one after the other.

    Args:
        state: mappings, lists and tuples of any values.
        kept: False for a process that only takes part in the exchange; it has None in their place.
    """
    if is_sharded(state):
        full = whole(state.detach())
        return full.to("cpu") if kept else None
    if isinstance(state, dict):
        values = {key: whole_values(value, kept=kept) for key, value in state.items()}
        return values if type(state) is dict else type(state)(values)
    if type(state) in (list, tuple):
        return type(state)(whole_values(value, kept=kept) for value in state)
    return state


def sharded_as(tensor: Tensor, like: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return a whole tensor, equal in all processes, on the device, in the shards and in the dtype of another, or in `dtype`."""
    tensor = tensor.to(dtype=like.dtype if dtype is None else dtype, device=like.device)
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    spread: Any = like
    return distribute_tensor(tensor, spread.device_mesh, spread.placements, src_data_rank=None)


def gathered(number: Tensor, tensor: Tensor) -> Tensor:
    """Return a number of every process that shares a sharded tensor, (n,): all processes reduce them in the same order."""
    mesh: Any = tensor
    numbers = [torch.empty_like(number) for _ in range(mesh.device_mesh.size())]
    dist.all_gather(numbers, number.detach().contiguous(), group=mesh.device_mesh.get_group())
    return torch.stack(numbers)


def total(shares: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of one number for each tensor: that of a sharded tensor is the number of this process's shard."""
    split = [k for k, x in enumerate(tensors) if is_sharded(x)]
    own = torch.stack([shares[k] for k in split]).sum()
    rest = [share for k, share in enumerate(shares) if k not in split]
    return torch.stack([gathered(own, tensors[split[0]]).sum(), *rest]).sum()


def largest(tensor: Tensor) -> float:
    """Return the largest absolute value of a tensor; zero if it has no entries."""
    if not is_sharded(tensor):
        return float(tensor.abs().max()) if tensor.numel() else 0.0
    shard = _shard(tensor)
    return float(gathered(shard.abs().max() if shard.numel() else shard.new_zeros(()), tensor).max())


def units(module: nn.Module) -> list[Any]:
    """Return the parts of a module that were given to `fully_shard`, each of which gathers its parameters to be evaluated."""
    loaded = sys.modules.get("torch.distributed.fsdp")
    if loaded is None or not isinstance(module, loaded.FSDPModule):
        return []
    return [part for part in module.modules() if isinstance(part, loaded.FSDPModule)]


def reshard(modules: Iterable[nn.Module]) -> None:
    """Let modules drop the parameters that an evaluation without a backward pass has gathered.

    Until then, the outermost unit keeps them, evaluates with them although its shards have changed, and has them as its
    parameters.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return
    for module in modules:
        for unit in units(module):
            unit.reshard()


def _shard(tensor: Any) -> Tensor:
    shard: Tensor = tensor._local_tensor  # to_local() would be recorded by autograd
    return shard
