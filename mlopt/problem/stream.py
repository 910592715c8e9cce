"""A level's batches, one after the other, epoch after epoch, in an order that depends on nothing but the seed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from ..errors import ProblemError
from ..generators import GeneratorState, derive_seed, preserved

__all__ = ["Stream", "refuse_persistent_workers", "to_device"]


class Stream:
    """Batches of one level, without end.

    Epoch e of the level is drawn with generators seeded from (seed, level, e), which the stream keeps to itself: the order
    does not depend on what training or an estimator draws, nor does training depend on the order.

    Args:
        name: the level's name, for errors and the seed.
        data: its batches, or None: then every batch is None.
        seed: of the order.
        device: where the batches are moved to.
    """

    def __init__(self, name: str, data: Iterable[Any] | None, seed: int, device: torch.device) -> None:
        self.name, self.data, self.seed, self.device = name, data, seed, device
        self.epoch = -1
        self.position = 0
        self._iterator: Iterator[Any] | None = None
        self._generators: GeneratorState | None = None
        #: Where the generators that the data bring along stand in this stream.
        self._own: list[torch.Tensor] = []
        # A list of batches draws nothing: no generator need be swapped for it.
        self._draws = not isinstance(data, (list, tuple))

    def next(self) -> Any:
        """Return the next batch, on the level's device.

        Raises:
            ProblemError: the data hold no batch.
        """
        if self.data is None:
            return None
        return to_device(self._isolated() if self._draws else self._advance(), self.device)

    def _isolated(self) -> Any:
        own = _own_generators(self.data)
        before = [generator.get_state() for generator in own]
        try:
            for generator, state in zip(own, self._own or before, strict=True):
                generator.set_state(state)
            with preserved((self.device,)):
                if self._generators is not None:
                    self._generators.restore()
                batch = self._advance()
                self._generators = GeneratorState.capture((self.device,))
            self._own = [generator.get_state() for generator in own]
        finally:
            for generator, state in zip(own, before, strict=True):
                generator.set_state(state)
        return batch

    def _advance(self) -> Any:
        for _ in range(2):
            if self._iterator is not None:
                try:
                    batch = next(self._iterator)
                except StopIteration:
                    pass
                else:
                    self.position += 1
                    return batch
            self._start_epoch()
        raise ProblemError(
            f"level {self.name!r}: its data hold no batch (with drop_last, is the batch larger than the data?)"
        )

    def _start_epoch(self) -> None:
        assert self.data is not None
        self.epoch, self.position = self.epoch + 1, 0
        if self._draws:
            GeneratorState.seeded(derive_seed(self.seed, self.name, self.epoch), (self.device,)).restore()
        self._iterator = iter(self.data)


def refuse_persistent_workers(name: str, data: Any, kind: str = "data") -> None:
    """Raise where batches cannot be drawn without a trace.

    Raises:
        ProblemError: the data are a DataLoader whose workers persist.
    """
    if getattr(data, "persistent_workers", False):
        remedy = f"pass batches={{{name!r}: batch}}, or build" if kind == "data" else "build"
        raise ProblemError(
            f"level {name!r}: the DataLoader of its {kind} has persistent_workers, which have one order for all who iterate; "
            f"{remedy} the loader without them"
        )


def _own_generators(data: Any) -> list[torch.Generator]:
    """Return the generators that a DataLoader and its samplers were given."""
    holders = [data, getattr(data, "sampler", None), getattr(data, "batch_sampler", None)]
    holders.append(getattr(holders[-1], "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with every tensor in it on the device; what has a `to` method of its own moves itself."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
