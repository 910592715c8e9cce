"""The conditions under which several processes can share levels: what is refused when a problem is built."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ProblemError
from ..ranks import Ranks
from ..shards import is_sharded, reshard
from .level import Level

__all__ = ["fingerprint", "refuse_batch_norm", "require_alike", "require_supported"]


def require_supported(levels: Sequence[Level], ranks: Ranks) -> None:
    """Raise if several processes cannot share levels.

    Raises:
        ProblemError: products are compiled, data are split by a sampler, or a module uses the statistics of a batch.
    """
    by_name = {level.name: level for level in levels}
    for level in levels:
        if getattr(level.estimator, "compile", False):
            raise ProblemError(
                f"level {level.name!r}: estimator={level.estimator}, and compiled products are not supported on {ranks.size} "
                "processes; use compile=False"
            )
        for label, data in (("data", level.data), ("curvature_data", getattr(level.estimator, "curvature_data", None))):
            if sampler := _splitting_sampler(data):
                raise ProblemError(
                    f"level {level.name!r}: its {label} have a {sampler}, which gives each process different rows, and mlopt "
                    "splits every batch over the processes itself; give the loader without it; its batches are for all processes"
                )
        if level.splits:
            refuse_batch_norm(level, [by_name[name].module for name in (level.name, *level.loss_references)], ranks)


def require_alike(levels: Iterable[Level], ranks: Ranks, when: str) -> None:
    """Raise unless the parameters and buffers of every level are bit-identical in all processes.

    Raises:
        ProblemError: they differ.
    """
    prints = ranks.all_of([(level.name, fingerprint(level.module)) for level in levels])
    for rank, other in enumerate(prints):
        if other == prints[0]:
            continue
        differing = [name for (name, own), first in zip(other, prints[0], strict=False) if (name, own) != first]
        place = f"level {differing[0]!r}" if differing else "the list of levels"
        raise ProblemError(
            f"{place} differs between process 0 and process {rank} {when}; build the same modules in every process: call "
            "torch.manual_seed with one seed before, or load the same file"
        )


def refuse_batch_norm(level: Level, modules: Iterable[nn.Module], ranks: Ranks) -> None:
    """Raise if modules of a level that is split normalise by the statistics of a batch.

    Raises:
        ProblemError: one does.
    """
    for part in (part for module in modules for part in module.modules()):
        if isinstance(part, _BatchNorm) and (part.training or part.running_mean is None):
            raise ProblemError(
                f"level {level.name!r}: a {type(part).__name__} takes the statistics of the rows that one of {ranks.size} "
                "processes has, so results depend on the number of processes; call eval() on it before the problem is "
                "built, use GroupNorm or LayerNorm, or evaluate the level on the whole batch in each process with "
                "Level(split=False)"
            )


def _splitting_sampler(data: Any) -> str:
    """Return the class of a sampler of a loader that leaves each process other rows; "" if there is none."""
    batches = getattr(data, "batch_sampler", None)
    for sampler in (getattr(data, "sampler", None), batches, getattr(batches, "sampler", None)):
        if getattr(sampler, "num_replicas", 1) not in (None, 1):
            return type(sampler).__name__
    return ""


def fingerprint(module: nn.Module) -> int:
    """Return a checksum of the parameters and buffers of a module, with their names, shapes and dtypes; sharded ones differ."""
    reshard((module,))
    total = 0
    for name, tensor in _tensors(module):
        total = zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode(), total)
        if tensor.numel() and not tensor.is_meta and not is_sharded(tensor):
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            total = zlib.crc32(flat.numpy().data, total)
    return total


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
