"""The batches of a level, epoch after epoch, in an order that depends only on the seed."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import torch

from ..errors import ProblemError
from ..rng import GeneratorState, derive_seed, preserved
from .batch import to_device

T = TypeVar("T")

_END = object()

__all__ = ["Stream"]


class Stream:
    """An endless stream of the batches of one level.

    Epoch e of the level is drawn with private generators, seeded from (seed, level, e): the order does not depend on the
    draws of training or of an estimator, and training does not depend on the order. The stream also isolates generators
    that the data hold under the name `generator`, in a loader, its samplers and its data set.

    Args:
        name: the level's name, for errors and the seed.
        data: its batches, or None: then every batch is None.
        seed: seed of the order.
        device: the device that batches are moved to.
    """

    def __init__(self, name: str, data: Iterable[Any] | None, seed: int, device: torch.device) -> None:
        self.name, self.data, self.seed, self.device = name, data, seed, device
        self.epoch = -1
        self.position = 0
        #: Batches to serve before the next ones of the data, and batches that are being recorded.
        self._replayed: deque[Any] = deque()
        self._recorded: list[Any] | None = None
        self._iterator: Iterator[Any] | None = None
        self._generators: GeneratorState | None = None
        #: States of the data's own generators in this stream, now and at the start of the epoch.
        self._own: list[torch.Tensor] = []
        self._own_at_start: list[torch.Tensor] = []
        # A list of batches draws no random numbers, so no generator is swapped for it.
        self._draws = not isinstance(data, (list, tuple))

    def next(self) -> Any:
        """Return the next batch, on the level's device.

        Raises:
            ProblemError: the data hold no batch.
        """
        if self.data is None:
            return None
        if self._draws or self._replayed or self._recorded is not None:
            return self._served(lambda: to_device(self._advance(), self.device))
        return to_device(self._advance(), self.device)

    def take(self, count: int | Literal["all"]) -> tuple[Any, ...]:
        """Return several batches where the data hold them, not moved: the next ones, or all of the next epoch.

        Args:
            count: their number; "all" for the whole of an epoch, which starts with the call.

        Raises:
            ProblemError: the data hold no batch.
        """
        if count == "all":
            return self._served(self._whole_epoch)
        return self._served(lambda: tuple(self._advance() for _ in range(count)))

    def _served(self, draw: Callable[[], T]) -> T:
        """Return what a replay holds, or else draw and record it."""
        if self._replayed:
            replayed: T = self._replayed.popleft()
            return replayed
        with self._isolated() if self._draws else contextlib.nullcontext():
            drawn = draw()
        if self._recorded is not None:
            self._recorded.append(drawn)
        return drawn

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Any]]:
        """Yield a list to which the batches served inside the context are added."""
        self._recorded = []
        try:
            yield self._recorded
        finally:
            self._recorded = None

    @contextlib.contextmanager
    def replaying(self, batches: Iterable[Any]) -> Iterator[None]:
        """Inside the context, serve these batches first; discard the rest on exit."""
        self._replayed.extend(batches)
        try:
            yield
        finally:
            self._replayed.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the stream; `generators` are the states of the data's own, at the start of the epoch."""
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position, "generators": self._own_at_start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position that `state_dict` returned: start its epoch again, and read and discard the batches before it.

        Raises:
            ProblemError: the epoch of these data has fewer batches.
        """
        self.seed = state["seed"]
        if state["epoch"] < 0:
            return
        self.epoch, self._own = state["epoch"] - 1, list(state["generators"])
        with self._isolated() if self._draws else contextlib.nullcontext():
            self._start_epoch()
            assert self._iterator is not None
            for self.position in range(1, state["position"] + 1):
                if next(self._iterator, _END) is _END:
                    raise ProblemError(
                        f"level {self.name!r}: its data end after {self.position - 1} batches, but the interrupted run had "
                        f"taken {state['position']} in its epoch; give the data of that run"
                    )

    @contextlib.contextmanager
    def _isolated(self) -> Iterator[None]:
        """Let the data draw from the stream's own generators, in the state in which the stream left them."""
        own = _own_generators(self.data)
        before = [generator.get_state() for generator in own]
        try:
            for generator, state in zip(own, self._own or before, strict=True):
                generator.set_state(state)
            with preserved((self.device,)):
                if self._generators is not None:
                    self._generators.restore()
                yield
                self._generators = GeneratorState.capture((self.device,))
            self._own = [generator.get_state() for generator in own]
        finally:
            for generator, state in zip(own, before, strict=True):
                generator.set_state(state)

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
        raise self._empty()

    def _whole_epoch(self) -> tuple[Any, ...]:
        if self._iterator is not None:
            # A resumed stream has read the batches of its epoch, but not the end, where a sampler may draw once more.
            deque(self._iterator, maxlen=0)
        self._start_epoch()
        assert self._iterator is not None
        batches, self._iterator = tuple(self._iterator), None
        self.position = len(batches)
        if not batches:
            raise self._empty()
        return batches

    def _empty(self) -> ProblemError:
        return ProblemError(
            f"level {self.name!r}: its data hold no batch (with drop_last, is the batch larger than the data?)"
        )

    def _start_epoch(self) -> None:
        assert self.data is not None
        self.epoch, self.position = self.epoch + 1, 0
        if self._draws:
            GeneratorState.seeded(derive_seed(self.seed, self.name, self.epoch), (self.device,)).restore()
            self._own_at_start = [generator.get_state() for generator in _own_generators(self.data)]
            for holder in _samplers(self.data):
                # Samplers and streaming data sets that shuffle on their own learn the epoch by this method.
                if callable(set_epoch := getattr(holder, "set_epoch", None)):
                    set_epoch(self.epoch)
        self._iterator = _iterate(self.data)


def _iterate(data: Iterable[Any]) -> Iterator[Any]:
    """Return a separate iterator over the data.

    A DataLoader with persistent workers rewinds the only iterator it has: a new iteration ends all others, and an epoch
    depends on earlier ones. So detach that iterator, let the loader start another, and give it back.
    """
    if not getattr(data, "persistent_workers", False):
        return iter(data)
    loader: Any = data
    kept, loader._iterator = loader._iterator, None
    try:
        return iter(loader)
    finally:
        loader._iterator = kept


def _own_generators(data: Any) -> list[torch.Generator]:
    """Return the generators that a DataLoader and its samplers were given."""
    generators = [getattr(holder, "generator", None) for holder in _samplers(data)]
    return list({id(g): g for g in generators if isinstance(g, torch.Generator)}.values())


def _samplers(data: Any) -> list[Any]:
    """Return the data and, for a DataLoader, its data set and samplers."""
    batches = getattr(data, "batch_sampler", None)
    parts = [data, getattr(data, "dataset", None), getattr(data, "sampler", None), batches]
    return [part for part in (*parts, getattr(batches, "sampler", None)) if part is not None]
