"""Whether what was computed is finite: looked at now, or noted on the device and looked at later."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar

import attrs
import torch
from torch import Tensor

from .errors import NonFiniteError
from .tensors import norm

__all__ = ["Watch", "at_once", "deferred", "require_finite"]

#: Says, from the value that was met (the norm, for a vector), what is not finite.
Sentence = Callable[[float], str]


@attrs.define(eq=False)
class Watch:
    """Norms that are still on their device, each with the outer step it is of and what to say where it is not finite.

    Attributes:
        step: the outer step that is noted with what comes.
    """

    step: int = 0
    _noted: list[tuple[int, Tensor, Sentence]] = attrs.field(factory=list, init=False)

    def note(self, value: Tensor, sentence: Sentence) -> None:
        """Keep a norm for the next `read`."""
        self._noted.append((self.step, value.detach(), sentence))

    def read(self) -> None:
        """Look at all norms noted since the last call, one wait for each device; the first that is not finite raises.

        Raises:
            NonFiniteError: with the outer step in which it was.
        """
        noted, self._noted = self._noted, []
        values: dict[int, float] = {}
        for kind in {(value.device, value.dtype) for _, value, _ in noted}:
            here = [k for k, (_, value, _) in enumerate(noted) if (value.device, value.dtype) == kind]
            values |= zip(here, torch.stack([noted[k][1] for k in here]).tolist(), strict=True)
        for k, (step, _, sentence) in enumerate(noted):
            if not math.isfinite(values[k]):
                raise NonFiniteError(sentence(values[k]), step=step)


_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextlib.contextmanager
def deferred(watch: Watch) -> Iterator[None]:
    """Let `require_finite` note what it is asked on the device, so that the host need not wait for it."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Let `require_finite` look at once, also inside `deferred`: what users call is to raise where they call it."""
    token = _watch.set(None)
    try:
        yield
    finally:
        _watch.reset(token)


def require_finite(vector: Sequence[Tensor], sentence: Sentence, *, size: Tensor | None = None) -> None:
    """Raise where a vector is not finite; inside `deferred`, note its norm for later.

    Args:
        vector: tensors of any shapes.
        sentence: says what it is, given its norm.
        size: its norm, where that is known.

    Raises:
        NonFiniteError: it holds NaN or infinity.
    """
    size = norm(vector) if size is None else size
    watch = _watch.get()
    if watch is not None:
        watch.note(size, sentence)
    elif not math.isfinite(value := size.item()):
        raise NonFiniteError(sentence(value))
