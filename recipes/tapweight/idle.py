"""Options that have no effect beside others: a run with one of them is refused, since its user expects an effect."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from .configuration import ConfigurationError

__all__ = ["Idle", "refuse_idle"]


@attrs.frozen
class Idle:
    """Options that have no effect in some runs.

    Args:
        options: the keys of the options.
        when: returns True for the configuration of a run in which they have none.
        reason: the end of a sentence that begins with "--OPTION has no effect".
        remedy: a clause on how the option has an effect.
    """

    options: tuple[str, ...]
    when: Callable[[Any], bool]
    reason: str
    remedy: str


def refuse_idle(configuration: Any, rows: Sequence[Idle], written: Mapping[str, str]) -> None:
    """Refuse a run with an option that has no effect.

    An option counts as given if the command line names it, or if its value is not the default.

    Args:
        configuration: the configuration of the run.
        rows: the options that have no effect in some runs.
        written: the options that the command line names, as they are written, by their keys.

    Raises:
        ConfigurationError: an option has no effect; the message names it, the reason and the remedies.
    """
    changed = set(_changed(configuration, type(configuration)()))
    for row in rows:
        given = [key for key in row.options if key in written or key in changed]
        if given and row.when(configuration):
            name = written.get(given[0], f"--{given[0].replace('_', '-')}")
            raise ConfigurationError(f"{name} has no effect {row.reason}; leave it out, or {row.remedy}")


def _changed(section: Any, default: Any) -> Iterator[str]:
    """Yield the keys whose values are not the defaults."""
    for field in attrs.fields(type(section)):
        value, usual = getattr(section, field.name), getattr(default, field.name)
        if attrs.has(type(value)):
            yield from _changed(value, usual)
        # The config.json of a result holds absolute paths.
        elif value != usual and not isinstance(usual, Path):
            yield field.name
