"""The random generators that a loss may draw from: seed, capture and restore them."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import attrs
import numpy as np
import torch
from torch import Tensor

__all__ = ["GeneratorState", "derive_seed", "preserved", "seed_everything"]

#: A device by its type and index.
_Place: TypeAlias = tuple[str, int]


class _Numpy:
    """The state of numpy's generator, read only if it has changed: numpy takes a hundred times longer for that than torch.

    The words compared here change with every draw, except with the second of two normal numbers that are generated together.
    Therefore a state that holds such a number is always read and restored in full, and equal words count as the same state only
    if no such number is pending.
    """

    _SIZE = 4 * 625

    def __init__(self) -> None:
        self._known: tuple[Any, bytes] | None = None

    def capture(self) -> Any:
        """Return `numpy.random.get_state(legacy=False)`."""
        state = self._current()
        if state is None:
            state = np.random.get_state(legacy=False)
            self._remember(state)
        return state

    def restore(self, state: Any) -> None:
        """Do `numpy.random.set_state(state)`."""
        words = self._words_of(state)
        if words is None:
            np.random.set_state(state)
            self._remember(state)
        else:
            np.random.seed(0)  # drops the second of two normal numbers, if it waits
            ctypes.memmove(np.random.get_bit_generator().ctypes.state_address, words, self._SIZE)  # type: ignore[attr-defined]
            self._known = state, words

    def _current(self) -> Any:
        """Return the state that was captured or restored last, if it is still the current one."""
        known = self._known  # another thread may replace it
        if known is None or self._words() != known[1] or self._pending(known[1]):
            return None
        return known[0]

    @staticmethod
    def _pending(words: bytes) -> bool:
        """Return True if the second of two normal numbers waits to be drawn; the generator, of these words, is left as it is.

        Only a draw shows it, one that leaves the words as they are.
        """
        number = np.random.standard_normal()
        address = np.random.get_bit_generator().ctypes.state_address  # type: ignore[attr-defined]
        if ctypes.string_at(address, len(words)) == words:
            np.random.set_state({**np.random.get_state(legacy=False), "has_gauss": 1, "gauss": number})
            return True
        ctypes.memmove(address, words, len(words))
        np.random.standard_normal()  # takes the second number of the draw
        return False

    def _remember(self, state: Any) -> None:
        words = self._words()
        self._known = None if words is None or state["has_gauss"] else (state, words)

    def _words_of(self, state: Any) -> bytes | None:
        """Return the words of a state, if they are all of it and the present generator is of its kind."""
        known = self._known
        if known is not None and known[0] is state and self._words() is not None:
            return known[1]
        if state["has_gauss"] or state["bit_generator"] != "MT19937" or self._words() is None:
            return None
        key, position = state["state"]["key"], state["state"]["pos"]
        return np.asarray(key, np.uint32).tobytes() + int(position).to_bytes(4, sys.byteorder)

    def _words(self) -> bytes | None:
        generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
        if type(generator) is not np.random.MT19937:
            return None
        return ctypes.string_at(generator.ctypes.state_address, self._SIZE)


_NUMPY = _Numpy()


class GeneratorState(ABC):
    """The state of the generators of torch (the CPU's and those of accelerators), Python and numpy."""

    @staticmethod
    def capture(devices: Iterable[torch.device] = ()) -> GeneratorState:
        """Return the current state; `devices` are those that the losses run on (the CPU is always included)."""
        return _Captured(
            cpu=torch.get_rng_state(),
            accelerators={
                (kind, index): torch.get_device_module(kind).get_rng_state(index)
                for kind, index in _accelerators(devices)
            },
            python=random.getstate(),
            numpy=_NUMPY.capture(),
        )

    @staticmethod
    def seeded(seed: int, devices: Iterable[torch.device] = ()) -> GeneratorState:
        """Return the state of generators seeded with `seed`, without changing any generator."""
        return _Seeded(seed, _accelerators(devices))

    @staticmethod
    def from_state_dict(state: Mapping[str, Any]) -> GeneratorState:
        """Return the state that `state_dict` returned as plain values; states of devices that are not here are left out."""
        places = {kind: own for kind, own in state.items() if kind not in ("cpu", "python", "numpy", "seed")}
        here = [(kind, index) for kind, own in places.items() for index in own if index < _count(kind)]
        if "seed" in state:
            return _Seeded(state["seed"], frozenset(here))
        accelerators = {(kind, index): places[kind][index] for kind, index in here}
        return _Captured(state["cpu"], accelerators, state["python"], state["numpy"])

    @abstractmethod
    def restore(self) -> None:
        """Set every generator to this state."""

    def same_as(self, other: GeneratorState) -> bool:
        """Return True if both are captured states, and every generator is in the same."""
        return False

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors, numbers and tuples of them."""


@attrs.frozen(eq=False)
class _Captured(GeneratorState):
    cpu: Tensor
    accelerators: dict[_Place, Tensor]
    python: Any
    numpy: Any

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for place, state in self.accelerators.items():
            torch.get_device_module(place[0]).set_rng_state(state, place[1])
        random.setstate(self.python)
        _NUMPY.restore(self.numpy)

    def state_dict(self) -> dict[str, Any]:
        kinds: dict[str, dict[int, Tensor]] = {"cuda": {}}
        for (kind, index), state in self.accelerators.items():
            kinds.setdefault(kind, {})[index] = state
        return {"cpu": self.cpu, **kinds, "python": self.python, "numpy": self.numpy}

    def same_as(self, other: GeneratorState) -> bool:
        """Return True if every generator is in the same state."""
        if not isinstance(other, _Captured) or self.accelerators.keys() != other.accelerators.keys():
            return False
        tensors = [(self.cpu, other.cpu), *((own, other.accelerators[k]) for k, own in self.accelerators.items())]
        numpy = self.numpy is other.numpy or repr(self.numpy) == repr(other.numpy)
        return numpy and self.python == other.python and all(torch.equal(a, b) for a, b in tensors)


@attrs.frozen(eq=False)
class _Seeded(GeneratorState):
    seed: int
    accelerators: frozenset[_Place]

    def restore(self) -> None:
        # torch.manual_seed would also record each call, with its stack, for types of devices that are not in use.
        torch.default_generator.manual_seed(self.seed)
        for place in self.accelerators:
            _seed(place, self.seed)
        random.seed(self.seed)
        np.random.seed(self.seed % 2**32)

    def state_dict(self) -> dict[str, Any]:
        kinds: dict[str, list[int]] = {"cuda": []}
        for kind, index in sorted(self.accelerators):
            kinds.setdefault(kind, []).append(index)
        return {"seed": self.seed, **kinds}


def _seed(place: _Place, seed: int) -> None:
    """Seed the default generator of a device; a kind with one device, such as MPS, has no list of them."""
    kind, index = place
    module = torch.get_device_module(kind)
    generators = getattr(module, "default_generators", ())
    (generators[index] if generators else module).manual_seed(seed)


def _accelerators(devices: Iterable[torch.device]) -> frozenset[_Place]:
    return frozenset((d.type, d.index or 0) for d in devices if d.type not in ("cpu", "meta"))


def _count(kind: str) -> int:
    """Return the number of devices of a kind on this machine."""
    try:
        return int(torch.get_device_module(kind).device_count())
    except RuntimeError:  # this build of torch does not know the kind
        return 0


def seed_everything(seed: int) -> None:
    """Seed the generators of torch, Python and numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextlib.contextmanager
def preserved(devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Restore the generators on exit.

    Example:
        >>> from mlopt.rng import preserved
        >>> with preserved():
        ...     number = torch.rand(())
        >>> bool(number == torch.rand(()))
        True
    """
    state = GeneratorState.capture(devices)
    try:
        yield
    finally:
        state.restore()


def derive_seed(*parts: object) -> int:
    """Return a seed below 2**63, a hash of its parts that is the same on every machine and in every process.

    Example:
        >>> from mlopt.rng import derive_seed
        >>> derive_seed(0, "classifier", 3)
        5980443107925826180
    """
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
