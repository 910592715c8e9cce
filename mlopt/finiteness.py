"""Checks for NaN and infinity, either immediate or deferred: a deferred check does not make the host wait for a device."""

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

__all__ = ["DeferredChecks", "deferred", "immediate", "require_finite"]

#: Returns the message of an error, given the value that is not finite (the norm of a vector).
Message = Callable[[float], str]


@attrs.define(eq=False)
class DeferredChecks:
    """Norms that are still on their device, each with its outer step and its message.

    Attributes:
        step: the outer step of the norms that are added.
    """

    step: int = 0
    _pending: list[tuple[int, Tensor, Message]] = attrs.field(factory=list, init=False)

    def add(self, value: Tensor, message: Message) -> None:
        """Keep a norm until the next call of `run`."""
        self._pending.append((self.step, value.detach(), message))

    def run(self) -> None:
        """Check the norms added since the last call; wait once for each device.

        Raises:
            NonFiniteError: a norm is not finite. It carries the outer step of the first such norm.
        """
        pending, self._pending = self._pending, []
        values: dict[int, float] = {}
        for group in {(value.device, value.dtype) for _, value, _ in pending}:
            indices = [k for k, (_, value, _) in enumerate(pending) if (value.device, value.dtype) == group]
            values |= zip(indices, torch.stack([pending[k][1] for k in indices]).tolist(), strict=True)
        for k, (step, _, message) in enumerate(pending):
            if not math.isfinite(values[k]):
                raise NonFiniteError(message(values[k]), step=step)


_checks: ContextVar[DeferredChecks | None] = ContextVar("checks", default=None)


@contextlib.contextmanager
def deferred(checks: DeferredChecks) -> Iterator[None]:
    """Inside the context, `require_finite` adds to `checks` instead of raising."""
    token = _checks.set(checks)
    try:
        yield
    finally:
        _checks.reset(token)


@contextlib.contextmanager
def immediate() -> Iterator[None]:
    """Inside the context, `require_finite` raises at once, also within `deferred`, for calls of functions that users wrote."""
    token = _checks.set(None)
    try:
        yield
    finally:
        _checks.reset(token)


def require_finite(vector: Sequence[Tensor], message: Message, *, size: Tensor | None = None) -> None:
    """Raise if a vector is not finite; inside `deferred`, check it later.

    Args:
        vector: tensors of any shapes.
        message: returns the message of the error, given the norm.
        size: the norm of the vector, if it is known; a scalar tensor.

    Raises:
        NonFiniteError: the vector contains NaN or infinity.

    Example:
        >>> from mlopt.finiteness import require_finite
        >>> require_finite((torch.ones(3),), lambda norm: f"the norm is {norm}")
        >>> require_finite((torch.tensor([torch.nan]),), lambda norm: f"the norm is {norm}")
        Traceback (most recent call last):
        ...
        mlopt.errors.NonFiniteError: the norm is nan
    """
    size = norm(vector) if size is None else size
    checks = _checks.get()
    if checks is not None:
        checks.add(size, message)
    elif not math.isfinite(value := size.item()):
        raise NonFiniteError(message(value))
