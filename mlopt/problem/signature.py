"""The signature of a loss, a residual, a regularizer or a solver: the levels that it refers to, and its settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ..errors import ProblemError

__all__ = ["references", "settings"]


def references(function: Callable[..., Any], label: str, *, positional: int) -> tuple[str, ...]:
    """Return the required keyword-only parameters of a loss: the names of the levels that it refers to.

    Keyword-only parameters with defaults are settings, not references.

    Raises:
        ProblemError: the function does not take the expected positional arguments.
    """
    if not callable(function):
        raise ProblemError(f"{label} is {function!r}, which is not callable; give a function")
    kinds = inspect.Parameter
    first = ("the module", "the batch")[:positional]
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError as error:
        raise ProblemError(f"{label}: its signature cannot be read ({error}); wrap it in a def") from error
    plain = [p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    required = [p for p in plain if p.default is kinds.empty]
    if len(plain) < positional or len(required) > positional:
        raise ProblemError(
            f"{label} takes {len(required)} required positional parameters ({', '.join(p.name for p in required)}); it must "
            f"take {positional} ({' and '.join(first)}), and the levels it refers to as keyword-only parameters, after a *"
        )
    for p in parameters:
        if p.kind is kinds.VAR_KEYWORD:
            raise ProblemError(
                f"{label} takes **{p.name}: name the levels it refers to, one keyword-only parameter each, so that the "
                "graph can be inferred"
            )
    return tuple(p.name for p in parameters if p.kind is kinds.KEYWORD_ONLY and p.default is kinds.empty)


def settings(function: Callable[..., Any], *, positional: int) -> tuple[str, ...]:
    """Return the parameters of a loss that have default values, apart from its first positional ones."""
    kinds = inspect.Parameter
    parameters = inspect.signature(function).parameters.values()
    plain = [p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    return tuple(p.name for p in parameters if p.default is not kinds.empty and p not in plain[:positional])
