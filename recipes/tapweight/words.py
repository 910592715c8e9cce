"""The words of a command line, checked against its options: unknown, repeated and missing ones are named with a remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin

import attrs

from mlopt.validation import shown

from .configuration import ConfigurationError

__all__ = ["Option", "given", "options_of"]

_HELP = ("--help", "-h")
#: Options of tyro's own, such as those that write completions for a shell.
_PASSED = "--tyro-"
_NUMBER = re.compile(r"-[.\d].*")


@attrs.frozen
class Option:
    """An option of a command line.

    Args:
        key: the name of its key in a configuration.
        most: the most values that it takes; None for any number.
    """

    key: str
    most: int | None


def options_of(kind: type) -> dict[str, Option]:
    """Return the options of a configuration, by each of their names.

    Args:
        kind: an attrs class whose sections are attrs classes.
    """
    options: dict[str, Option] = {}
    for field in attrs.fields(attrs.resolve_types(kind)):
        annotated = get_origin(field.type) is Annotated
        plain, *marks = get_args(field.type) if annotated else (field.type,)
        if attrs.has(plain):
            options |= options_of(plain)
        if attrs.has(plain) or isinstance(plain, TypeVar):
            continue
        option, name = Option(field.name, _most(plain)), field.name.replace("_", "-")
        aliases = [alias for mark in marks for alias in getattr(mark, "aliases", None) or ()]
        options |= dict.fromkeys([f"--{name}", *aliases, *([f"--no-{name}"] if plain is bool else [])], option)
    return options


def given(words: Sequence[str], options: dict[str, Option], *, positional: bool = False) -> dict[str, str]:
    """Return the options among some words: the name that was written, by the key.

    Args:
        words: the words of a command line.
        options: the options by name.
        positional: True if there are words that belong to no option; the number of values is not checked then.

    Raises:
        ConfigurationError: a word is not an option, an option is given twice, or it has too few or too many values.
    """
    if any(word in _HELP or word.startswith(_PASSED) for word in words):
        return {}
    written: dict[str, str] = {}
    for name, values in _groups(words, positional):
        if (option := options.get(name.replace("_", "-"))) is None:
            raise ConfigurationError(_unknown(name, options))
        if (first := written.get(option.key)) is not None:
            both = f"{name} is given twice" if first == name else f"{first} and {name} name the same option"
            raise ConfigurationError(f"{both}; give it once{', with all its values' if option.most is None else ''}")
        written[option.key] = name
        if not positional:
            _check_count(name, values, option.most)
    return written


def _most(kind: Any) -> int | None:
    """Return the most values of an option of a type."""
    kinds = {get_origin(each) or each for each in (kind, *get_args(kind)) if each is not NoneType}
    return None if tuple in kinds else 0 if kind is bool else 1


def _groups(words: Sequence[str], positional: bool) -> Iterator[tuple[str, list[str]]]:
    """Yield each option with its values; "--a=b" is an option with a value."""
    groups: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("-") and word != "-" and not _NUMBER.fullmatch(word):
            name, equals, value = word.partition("=")
            groups.append((name, [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        elif not positional:
            raise ConfigurationError(
                f"{shown(word)} comes before the first option; give options, such as --output FOLDER"
            )
    yield from groups


def _unknown(name: str, options: dict[str, Option]) -> str:
    """Return the sentence on a word that is not the name of an option."""
    near = difflib.get_close_matches(name, options, n=1)
    meant = f"did you mean {near[0]}?" if near else "--help lists all"
    return f"there is no option {name}; {meant}"


def _check_count(name: str, values: Sequence[str], most: int | None) -> None:
    """Refuse too few or too many values of an option."""
    if most != 0 and not values:
        raise ConfigurationError(f"{name} has no value; give {'one' if most else 'at least one'} after it")
    if most is not None and len(values) > most:
        takes = "one value" if most else "no value"
        quotes = "; put quotes around a value with spaces" if most else "; leave it out"
        raise ConfigurationError(f"{name} takes {takes}, and {shown(values[most])} is one too many{quotes}")
