"""Notices of errors, which other processes raise; those of processes that end early are read between and after exchanges."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import attrs
import torch.distributed as dist

from .errors import MloptError, NonFiniteError, ProblemError, ProcessError

__all__ = ["Notice", "Watch", "last_words", "noticed"]

#: Seconds between two readings.
_PAUSE = 1.0
#: Errors that are of the same class in every process, because a run handles them.
_SAME: dict[str, type[MloptError]] = {kind.__name__: kind for kind in (NonFiniteError, ProblemError)}

#: Numbers the contexts `noticed`, which all processes enter in the same order, and the topic of the present one.
_CONTEXTS = itertools.count()
_TOPIC: ContextVar[str | None] = ContextVar("topic", default=None)


@attrs.frozen
class Notice:
    """An error of a process, as the others raise it.

    Attributes:
        rank: the number of the process in its group; in the default group if it ends early.
        kind: the class of the error.
        text: the message of that.
    """

    rank: int
    kind: str
    text: str

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Notice:
        """Return the notice of an error of the process with this number."""
        return cls(rank, type(error).__name__, str(error))

    def error(self, size: int) -> MloptError:
        """Return the error of the others, in a group of this size."""
        return _SAME.get(self.kind, ProcessError)(f"process {self.rank} of {size} raised {self.kind}: {self.text}")


@contextlib.contextmanager
def noticed() -> Iterator[Callable[[BaseException], Notice | None]]:
    """Report an error that leaves this context to the other processes, which enter the same context.

    Yields:
        A function that posts an error of this process, and returns the notice of another process that was there before.
    """
    topic = f"context {next(_CONTEXTS)}"
    token = _TOPIC.set(topic)
    try:
        yield lambda error: _others(_post(topic, error))
    finally:
        _TOPIC.reset(token)


def last_words() -> Notice | None:
    """Return the notice of another process that left the present `noticed` context by an error."""
    topic = _TOPIC.get()
    return None if topic is None else _others(_posted(topic))


def _others(notice: Notice | None) -> Notice | None:
    """Return a notice unless it is that of this process."""
    return None if notice is None or notice.rank == dist.get_rank() else notice


def _post(topic: str, error: BaseException) -> Notice | None:
    """Post the error of this process; return the first notice under this topic."""
    if (store := _store()) is None:
        return None
    own = Notice.of(dist.get_rank(), error)
    try:
        return Notice(**json.loads(store.compare_set(_key(topic), "", json.dumps(attrs.asdict(own)))))
    except (RuntimeError, ValueError):
        return own  # the process that holds the store has ended


def _posted(topic: str) -> Notice | None:
    """Return the first notice under a topic, if there is one."""
    if (store := _store()) is None:
        return None
    try:
        return Notice(**json.loads(store.get(_key(topic)))) if store.check([_key(topic)]) else None
    except (RuntimeError, ValueError):
        return None


@attrs.define(eq=False)
class Watch:
    """Reports if a process of the group has ended early; it reads a notice at most once a second, so that each step can ask.

    Args:
        topic: what the processes do, in a word that they have not used before.
    """

    topic: str
    ended: bool = attrs.field(default=False, init=False)
    _read_at: float = attrs.field(factory=time.monotonic, init=False)

    def post(self, error: BaseException) -> None:
        """Let the others know that this process ends."""
        if not self.ended:
            self.ended = True
            _post(self.topic, error)

    def __call__(self) -> bool:
        """Return True if a process has ended early."""
        if not self.ended and time.monotonic() - self._read_at >= _PAUSE:
            self.ended = _posted(self.topic) is not None
            self._read_at = time.monotonic()
        return self.ended


def _key(topic: str) -> str:
    return f"mlopt/ended/{topic}"


def _store() -> Any:
    """Return the store by which the processes of the default group have met; None without a group."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return dist.distributed_c10d._get_default_store()
