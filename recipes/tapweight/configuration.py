"""Read configurations of any attrs class from TOML and JSON files and from the command line, and write them."""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import os
import tomllib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar, get_args, get_origin

import attrs
import cattrs
import tyro
from cattrs.cols import homogenous_tuple_structure_factory
from cattrs.gen import make_dict_structure_fn
from tyro.conf import arg

from mlopt.errors import MloptError
from mlopt.validation import shown

__all__ = ["CommandLine", "ConfigurationError", "parse", "read", "write"]

C = TypeVar("C")
#: Faults of one file that an error names; a file of another program can have hundreds.
_MOST_COMPLAINTS = 3
#: Types of options that are numbers, with the words for them in errors.
_NUMBERS = {int: "a whole number", float: "a number"}
#: Between the faults of one section; `shown` escapes it.
_SEPARATOR = "\x1f"


class ConfigurationError(MloptError, ValueError):
    """A configuration that cannot be run; the message names the key, its value and the allowed values."""


@attrs.frozen(kw_only=True)
class CommandLine(Generic[C]):
    """A command line: a run, and options that are not part of the run.

    Args:
        config: a TOML or JSON file with any of these options, such as the config.json of an earlier result; the command line
            overrides it. Paths in it are relative to the current folder.
        overwrite: replace the result that --output holds.
        resume: continue the run that --output holds from its newest checkpoints, if there is one.
        plan: read and check everything, and print what the run would do and how long it would take. Nothing is trained or
            written to --output.
        run: the configuration of the run.
    """

    config: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    overwrite: bool = False
    resume: bool = False
    plan: bool = False
    run: Annotated[C, arg(name="")]


def parse(arguments: Sequence[str], kind: type[C], *, prog: str, description: str) -> CommandLine[C]:
    """Return a command line. Options that it leaves out come from its `--config`, else from the defaults.

    Args:
        arguments: the options.
        kind: the class of configurations.
        prog: the name of the command.
        description: a sentence on the command, for `--help`.

    Raises:
        ConfigurationError: the file cannot be used, or an option has a wrong value.
        SystemExit: after `--help`, and arguments that cannot be parsed.
    """
    first = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    file = first.parse_known_args(arguments)[0].config
    default = CommandLine(run=kind() if file is None else read(file, kind))
    # tyro would name the class of a section, not the option.
    with attrs.validators.disabled():
        line: CommandLine[C] = tyro.cli(
            CommandLine[kind],  # type: ignore[valid-type]
            args=arguments,
            default=default,
            config=(tyro.conf.OmitArgPrefixes,),
            prog=prog,
            description=description,
            registry=_REGISTRY,
        )
    # Validators would compare words with numbers.
    for path, reason in itertools.chain(_unread(line.run), _faults(line.run)):
        raise ConfigurationError(f"{_as_written(path.rpartition('.')[2], arguments)}{reason}")
    return line


class _Unread(str):
    """A word of the command line that is not the number that it should be; tyro's own message would be a box."""

    expected: str

    def __new__(cls, word: str, expected: str) -> Self:
        made = super().__new__(cls, word)
        made.expected = expected
        return made


def _registry() -> tyro.constructors.ConstructorRegistry:
    """Return rules by which tyro reads numbers and keeps other words, so that the error can name the option."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def number(kind: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
        if kind.type not in _NUMBERS:
            return None

        def read(words: list[str]) -> Any:
            try:
                return kind.type(words[0])
            except ValueError:
                return _Unread(words[0], _NUMBERS[kind.type])

        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar=kind.type.__name__.upper(),
            instance_from_str=read,
            is_instance=lambda value: type(value) is kind.type or (kind.type is float and type(value) is int),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _unread(section: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted path of each value that holds a word in place of a number, and the rest of the sentence on it."""
    for field in attrs.fields(type(section)):
        value = getattr(section, field.name)
        if attrs.has(type(value)):
            yield from _unread(value, f"{path}{field.name}.")
        for entry in value if isinstance(value, tuple) else (value,):
            if isinstance(entry, _Unread):
                yield f"{path}{field.name}", f"={shown(str(entry))}; it must be {entry.expected}"


def _as_written(name: str, arguments: Sequence[str]) -> str:
    """Return the option of a key as it is among the arguments: --seed is another name of --seeds."""
    option = f"--{name.replace('_', '-')}"
    written = {argument.partition("=")[0] for argument in arguments}
    return option[:-1] if option not in written and option.endswith("s") and option[:-1] in written else option


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
    if faults := [f"{path}{reason}" for path, reason in _faults(configuration)]:
        raise ConfigurationError(f"{file}: {_joined(faults)}")
    return configuration


def write(configuration: Any, file: Path) -> None:
    """Write a configuration as JSON, for `read`."""
    content = _CONVERTER.unstructure(configuration)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _faults(section: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted path of each value that its validator refuses, and the rest of the sentence on it."""
    for field in attrs.fields(type(section)):
        value = getattr(section, field.name)
        if attrs.has(type(value)):
            yield from _faults(value, f"{path}{field.name}.")
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


_CONVERTER, _REGISTRY = _converter(), _registry()
