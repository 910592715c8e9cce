"""The command line of a run: its options are those of a configuration, and their mistakes get one sentence each."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar, get_args, get_origin

import attrs
import tyro
from tyro.conf import arg

from mlopt.validation import shown

from .configuration import ConfigurationError, faults, read
from .words import given, options_of

__all__ = ["CommandLine", "parse", "written_options"]

C = TypeVar("C")
#: Types of options that are numbers, with the words for them in errors.
_NUMBERS = {int: "a whole number", float: "a number"}


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
        SystemExit: after `--help`.
    """
    written = written_options(arguments, kind)
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
    for path, reason in itertools.chain(_unread(line.run), faults(line.run)):
        key = path.rpartition(".")[2]
        raise ConfigurationError(f"{written.get(key) or '--' + key.replace('_', '-')}{reason}")
    return line


def written_options(arguments: Sequence[str], kind: type[Any]) -> dict[str, str]:
    """Return the options of a command line, as they are written, by their keys.

    Args:
        arguments: the options.
        kind: the class of configurations.

    Raises:
        ConfigurationError: an option does not exist, is given twice, or has too few or too many values.
    """
    return given(arguments, options_of(CommandLine) | options_of(kind))


class _Unread(str):
    """A word of the command line that its option does not take; tyro's own message would be a box."""

    expected: str

    def __new__(cls, word: str, expected: str) -> Self:
        made = super().__new__(cls, word)
        made.expected = expected
        return made


def _registry() -> tyro.constructors.ConstructorRegistry:
    """Return rules by which tyro reads numbers and choices and keeps other words, so that the error can name the option."""
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

    @registry.primitive_rule
    def choice(kind: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
        if get_origin(kind.type) is not Literal:
            return None
        choices = get_args(kind.type)
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar=f"{{{','.join(choices)}}}",
            instance_from_str=lambda words: words[0] if words[0] in choices else _Unread(words[0], _one_of(choices)),
            is_instance=lambda value: value in choices,
            str_from_instance=lambda value: [value],
        )

    return registry


def _one_of(choices: Sequence[str]) -> str:
    """Return the end of the sentence on a word that is not one of some choices."""
    return f"one of {', '.join(map(repr, choices))}"


def _unread(section: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted path of each value that holds a word that its option does not take, and the rest of the sentence on it."""
    for field in attrs.fields(type(section)):
        value = getattr(section, field.name)
        if attrs.has(type(value)):
            yield from _unread(value, f"{path}{field.name}.")
        for entry in value if isinstance(value, tuple) else (value,):
            if isinstance(entry, _Unread):
                yield f"{path}{field.name}", f"={shown(str(entry))}; it must be {entry.expected}"


_REGISTRY = _registry()
