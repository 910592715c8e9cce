"""Read configurations of any attrs class from TOML and JSON files, and write them."""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import attrs
import cattrs
from cattrs.cols import homogenous_tuple_structure_factory
from cattrs.gen import make_dict_structure_fn

from mlopt.errors import MloptError
from mlopt.validation import shown

__all__ = ["ConfigurationError", "faults", "read", "write"]

C = TypeVar("C")
#: Faults of one file that an error names; a file of another program can have hundreds.
_MOST_COMPLAINTS = 3
#: Between the faults of one section; `shown` escapes it.
_SEPARATOR = "\x1f"


class ConfigurationError(MloptError, ValueError):
    """A configuration that cannot be run; the message names the key, its value and the allowed values."""


def read(file: Path, kind: type[C]) -> C:
    """Read a configuration file.

    Args:
        file: .toml or .json.
        kind: the class of configurations: an attrs class whose sections are attrs classes.

    Raises:
        ConfigurationError: the file cannot be read or parsed, or it has an unknown key or a wrong value.
    """
    if file.suffix not in (".toml", ".json"):
        raise ConfigurationError(f"{file}: a configuration is a .toml or a .json file")
    loads = tomllib.loads if file.suffix == ".toml" else json.loads
    try:
        content = loads(file.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise ConfigurationError(f"{file}: {reason}; give the path of a configuration") from error
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{file}: not valid {file.suffix[1:].upper()} ({error})") from error
    try:
        with attrs.validators.disabled():
            configuration = _CONVERTER.structure(content, kind)
    except (cattrs.BaseValidationError, _UnexpectedError) as error:
        raise ConfigurationError(f"{file}: {_joined(_complaints(error, kind))}") from error
    if refused := [f"{path}{reason}" for path, reason in faults(configuration)]:
        raise ConfigurationError(f"{file}: {_joined(refused)}")
    return configuration


def write(configuration: Any, file: Path) -> None:
    """Write a configuration as JSON, for `read`."""
    content = _CONVERTER.unstructure(configuration)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def faults(section: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted path of each value that its validator refuses, and the rest of the sentence on it."""
    for field in attrs.fields(type(section)):
        value = getattr(section, field.name)
        if attrs.has(type(value)):
            yield from faults(value, f"{path}{field.name}.")
        elif field.validator is not None:
            try:
                field.validator(section, field, value)
            except ValueError as error:
                sentence = str(error).removeprefix(f"{type(section).__name__}: ")
                yield f"{path}{field.name}", sentence.removeprefix(field.name)


def _joined(complaints: Sequence[str]) -> str:
    """Return the first complaints in one sentence, and the number of the others."""
    more = len(complaints) - _MOST_COMPLAINTS
    return "; ".join([*complaints[:_MOST_COMPLAINTS], *([f"and {more} more"] if more > 0 else [])])


class _UnexpectedError(MloptError, ValueError):
    """A value of another kind than it must be."""


def _expect(good: bool, value: Any, kind: str) -> Any:
    if not good:
        raise _UnexpectedError(f"={shown(value)}; it must be {kind}")
    return value


def _converter() -> cattrs.Converter:
    """Return a converter that does not coerce values: cattrs alone would read "3" as 3, and "ab" as ("a", "b")."""
    converter = cattrs.Converter(forbid_extra_keys=True)
    for kind, accepted, name in (
        (bool, (bool,), "true or false"),
        (int, (int,), "a whole number"),
        (float, (float, int), "a number"),
        (str, (str,), "text"),
    ):
        converter.register_structure_hook(kind, _scalar(kind, accepted, name))
    converter.register_structure_hook(Path, lambda value, _: Path(_expect(_is_path(value), value, "a path, as text")))
    converter.register_unstructure_hook(Path, str)

    @converter.register_structure_hook_factory(_is(Literal))
    def choice(kind: Any) -> Any:
        expected = f"one of {', '.join(map(repr, get_args(kind)))}"
        return lambda value, _: _expect(isinstance(value, str) and value in get_args(kind), value, expected)

    @converter.register_structure_hook_factory(_is(tuple))
    def sequence(kind: Any, converter: cattrs.Converter) -> Any:
        structure = homogenous_tuple_structure_factory(kind, converter)
        return lambda value, _: structure(_expect(isinstance(value, list), value, "a list"), kind)

    @converter.register_structure_hook_factory(attrs.has)
    def section(kind: Any, converter: cattrs.Converter) -> Any:
        structure = make_dict_structure_fn(kind, converter, _cattrs_forbid_extra_keys=True)
        return lambda value, _: structure(_expect(isinstance(value, dict), value, "a table of keys"), kind)

    return converter


def _is(origin: Any) -> Callable[[Any], bool]:
    """Return the predicate of types such as `tuple[int, ...]`."""
    return lambda kind: get_origin(kind) == origin


def _scalar(kind: Any, accepted: tuple[type, ...], name: str) -> Any:
    return lambda value, _: kind(_expect(type(value) in accepted, value, name))


def _is_path(value: Any) -> bool:
    """Return True if a value is text that the file system accepts: JSON can write half a character, and a NUL."""
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def _complaints(error: Exception, kind: type) -> list[str]:
    """Return the faults of a file, each with its key."""
    complaints = []
    for line in cattrs.transform_error(error, path="", format_exception=partial(_complaint, kind)):
        texts, _, path = line.rpartition(" @ ")
        complaints += [f"{path.removeprefix('.') or 'the configuration'}{text}" for text in texts.split(_SEPARATOR)]
    return complaints


def _complaint(kind: type, error: BaseException, _: type | None) -> str:
    if isinstance(error, _UnexpectedError):
        return str(error)
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        return _SEPARATOR.join(_unknown(key, error.cl, kind) for key in sorted(error.extra_fields))
    return f": {error}"


def _unknown(key: str, section: type, whole: type) -> str:
    parts = {field.name: field.type for field in attrs.fields(attrs.resolve_types(whole)) if attrs.has(field.type)}
    own = {name: name for name in attrs.fields_dict(section)}
    places = {name: f"{part}.{name}" for part, kind in parts.items() for name in attrs.fields_dict(kind)}
    near = [known[name] for known in (own, places) for name in difflib.get_close_matches(key, known, n=1)]
    return (
        f" has no key {shown(key)}; did you mean {near[0]!r}?"
        if near
        else f" has no key {shown(key)}; it has {', '.join(own)}"
    )


_CONVERTER = _converter()
