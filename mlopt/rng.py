"""The random generators that a loss may draw from: seed, capture and restore them."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

__all__ = ["GeneratorState", "derive_seed", "preserved", "seed_everything"]


class _Numpy:
    """The state of numpy's generator, read only if it has changed: numpy takes a hundred times longer for that than torch.

    The words compared here change with every draw, except with the second of two normal numbers that are generated together.
    Therefore a state that holds such a number is always read and restored in full.
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
        if self._current() is not state:
            np.random.set_state(state)
            self._remember(state)

    def _current(self) -> Any:
        """Return the state that was captured or restored last, if it is still the current one."""
        return self._known[0] if self._known is not None and self._known[1] == self._words() else None

    def _remember(self, state: Any) -> None:
        words = self._words()
        self._known = None if words is None or state["has_gauss"] else (state, words)

    def _words(self) -> bytes | None:
        generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
        if type(generator) is not np.random.MT19937:
            return None
        return ctypes.string_at(generator.ctypes.state_address, self._SIZE)


_NUMPY = _Numpy()


class GeneratorState(ABC):
    """The state of the generators of torch (CPU and CUDA), Python and numpy."""

    @staticmethod
    def capture(devices: Iterable[torch.device] = ()) -> GeneratorState:
        """Return the current state; `devices` are those that the losses run on (the CPU is always included)."""
        return _Captured(
            cpu=torch.get_rng_state(),
            cuda={index: torch.cuda.get_rng_state(index) for index in _cuda_indices(devices)},
            python=random.getstate(),
            numpy=_NUMPY.capture(),
        )

    @staticmethod
    def seeded(seed: int, devices: Iterable[torch.device] = ()) -> GeneratorState:
        """Return the state of generators seeded with `seed`, without changing any generator."""
        return _Seeded(seed, _cuda_indices(devices))

    @staticmethod
    def from_state_dict(state: Mapping[str, Any]) -> GeneratorState:
        """Return the state that `state_dict` returned as plain values; states of GPUs that are not here are left out."""
        here = range(torch.cuda.device_count())
        if "seed" in state:
            return _Seeded(state["seed"], frozenset(state["cuda"]).intersection(here))
        return _Captured(**{**state, "cuda": {index: own for index, own in state["cuda"].items() if index in here}})

    @abstractmethod
    def restore(self) -> None:
        """Set every generator to this state."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors, numbers and tuples of them."""


@attrs.frozen(eq=False)
class _Captured(GeneratorState):
    cpu: Tensor
    cuda: dict[int, Tensor]
    python: Any
    numpy: Any

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for index, state in self.cuda.items():
            torch.cuda.set_rng_state(state, index)
        random.setstate(self.python)
        _NUMPY.restore(self.numpy)

    def state_dict(self) -> dict[str, Any]:
        return {"cpu": self.cpu, "cuda": self.cuda, "python": self.python, "numpy": self.numpy}


@attrs.frozen(eq=False)
class _Seeded(GeneratorState):
    seed: int
    cuda: frozenset[int]

    def restore(self) -> None:
        # torch.manual_seed would also record each call, with its stack, for types of devices that are not in use.
        torch.default_generator.manual_seed(self.seed)
        for index in self.cuda:
            torch.cuda.default_generators[index].manual_seed(self.seed)
        random.seed(self.seed)
        np.random.seed(self.seed % 2**32)

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "cuda": sorted(self.cuda)}


def _cuda_indices(devices: Iterable[torch.device]) -> frozenset[int]:
    return frozenset(d.index or 0 for d in devices if d.type == "cuda")


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
