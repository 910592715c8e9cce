"""SIGTERM and SIGINT, noted until the present step is finished."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interruption"]


class Interruption:
    """A context in which the first SIGTERM or SIGINT is only noted; the second does what it did before.

    Signals that are ignored, as in a background job of a shell, stay so. Outside the main thread, which alone may handle
    signals, the context does nothing.

    Attributes:
        received: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for kind in (signal.SIGTERM, signal.SIGINT):
                handler = signal.getsignal(kind)
                if handler is not None and handler is not signal.SIG_IGN:
                    self._before[kind] = handler
                    signal.signal(kind, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._put_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._put_back()

    def _put_back(self) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)
        self._before = {}
