"""SIGTERM and SIGINT, and the end of work that a run is a part of, held back until the current step is finished."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interruption", "ended_elsewhere", "ending_if"]

_ELSEWHERE: ContextVar[Callable[[], bool] | None] = ContextVar("elsewhere", default=None)


@contextlib.contextmanager
def ending_if(ended: Callable[[], bool]) -> Iterator[None]:
    """Let the runs inside end after the current step, saved if they save checkpoints, once `ended` returns True.

    They raise `mlopt.Interrupted`, as after a signal. Each step calls the function.
    """
    token = _ELSEWHERE.set(ended)
    try:
        yield
    finally:
        _ELSEWHERE.reset(token)


def ended_elsewhere() -> bool:
    """Return True if the work that this run is a part of has ended."""
    ended = _ELSEWHERE.get()
    return ended is not None and ended()


class Interruption:
    """A context that only records the first SIGTERM or SIGINT; a second signal has its usual effect.

    A signal inside two such contexts is recorded by both.

    Ignored signals remain ignored, as in a background job of a shell. Outside the main thread, which alone can handle signals,
    the context does nothing.

    Attributes:
        received: the signal that arrived, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                handler = signal.getsignal(number)
                if handler is not None and handler is not signal.SIG_IGN:
                    self._handlers[number] = handler
                    signal.signal(number, self._record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore_handlers()

    @property
    def status(self) -> int:
        """The exit status after the signal."""
        return 130 if self.received is signal.SIGINT else 0

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        outer = self._handlers.get(self.received)
        self._restore_handlers()
        if isinstance(owner := getattr(outer, "__self__", None), Interruption):
            owner._record(number, frame)

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
