"""Configurations of runs: typed, read from a TOML or JSON file, overridden by the command line; the same for every modality."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import tomllib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import attrs
import cattrs
import tyro
from cattrs.cols import homogenous_tuple_structure_factory
from cattrs.gen import make_dict_structure_fn
from tyro.conf import arg

from mlopt.errors import MloptError
from mlopt.validation import at_least, shown

__all__ = ["ConfigurationError", "Options", "Run", "distinct", "missing", "parse", "read", "seeds", "write"]

C = TypeVar("C")
L = TypeVar("L")
_FILE, _FOLDER = "FILE", "FOLDER"
_LARGEST_SEED = 2**32 - 1  # numpy's


class ConfigurationError(MloptError, ValueError):
    """A configuration that cannot be run; the message says which key, what was found and what it may be."""


def distinct(instance: object, attribute: attrs.Attribute[Any], value: tuple[Any, ...]) -> None:
    """Validate that there is at least one, and each once."""
    if not value or len(set(value)) < len(value):
        raise ConfigurationError(f"{attribute.name}={shown(list(value))}; give at least one, and each once")


def seeds(instance: object, attribute: attrs.Attribute[Any], value: tuple[int, ...]) -> None:
    """Validate seeds."""
    distinct(instance, attribute, value)
    if not 0 <= min(value) <= max(value) <= _LARGEST_SEED:
        raise ConfigurationError(
            f"{attribute.name}={shown(list(value))}; seeds are whole numbers from 0 to {_LARGEST_SEED}"
        )


@attrs.frozen(kw_only=True)
class Run:
    """What every run has, whatever the modality.

    Args:
        output: where the result is written: weights, scores, history, picture, encoder and configuration.
        steps: pretraining steps, each on one batch of the corpus.
        seeds: of everything random, also of a random split. With several, each is a run of its own, in a folder seed-N inside the
            output folder, and means and standard deviations over the runs are told as well.
        baselines: what to compare with: finetuning without pretraining, and pretraining with equal weights.
        device: where to compute; auto is a GPU where there is one.
        checkpoint_every: steps of each phase from one checkpoint in the output folder to the next.
    """

    output: Annotated[Path | None, arg(metavar=_FOLDER, help_behavior_hint="(required)")] = None
    steps: int = attrs.field(default=2_000, validator=at_least(1))
    seeds: Annotated[tuple[int, ...], arg(metavar="N [N ...]", aliases=["--seed"])] = attrs.field(
        default=(0,), validator=seeds
    )
    baselines: Annotated[tuple[Literal["direct", "equal"], ...], arg(metavar="[{direct,equal} ...]")] = (
        "direct",
        "equal",
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpoint_every: int = attrs.field(default=100, validator=at_least(1))


@attrs.frozen(kw_only=True, slots=False)  # beside a configuration among the bases, of which one alone may have slots
class Options:
    """What a command line has that is no part of a run.

    Args:
        config: a TOML or JSON file with any of these options, such as the config.json of an earlier result; the command line
            overrides it. Paths in it are relative to the current folder.
        overwrite: replace the result that --output holds.
        resume: go on with the run that --output holds, from its newest checkpoints, if there is one.
    """

    config: Annotated[Path | None, arg(metavar=_FILE, help_behavior_hint="(default: none)")] = None
    overwrite: bool = False
    resume: bool = False


def parse(arguments: Sequence[str], line: type[L], kind: type[C], *, prog: str) -> L:
    """Return the configuration of a command line: its own options, else those of its `--config`, else the defaults.

    Args:
        arguments: the options.
        line: the class of command lines: that of configurations, and the options that are no part of a run.
        kind: the class of configurations.
        prog: how the command was called.

    Raises:
        ConfigurationError: the file cannot be used, or an option has a wrong value.
        SystemExit: after `--help`, and arguments that cannot be parsed.
    """
    first = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    file = first.parse_known_args(arguments)[0].config
    start = kind() if file is None else read(file, kind)
    fields = {field.name: getattr(start, field.name) for field in attrs.fields(kind)}
    return tyro.cli(line, args=arguments, default=line(**fields), config=(tyro.conf.OmitArgPrefixes,), prog=prog)


def read(file: Path, kind: type[C]) -> C:
    """Read a configuration file.

    Args:
        file: .toml or .json.
        kind: the class of configurations: an attrs class whose sections are attrs classes.

    Raises:
        ConfigurationError: the file cannot be read, it is not in its format, it has a key that there is not, or a wrong value.
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
        return _CONVERTER.structure(content, kind)
    except (cattrs.BaseValidationError, _UnexpectedError) as error:
        raise ConfigurationError(f"{file}: {'; '.join(_complaints(error, kind))}") from error


def write(configuration: Any, file: Path) -> None:
    """Write a configuration as JSON, for `read`."""
    content = _CONVERTER.unstructure(configuration)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def missing(path: str) -> ConfigurationError:
    """Return the error for a required key that is missing."""
    section, _, name = path.rpartition(".")
    return ConfigurationError(
        f"--{name} is missing; give it, or `{name}`{f' in [{section}]' if section else ''} in --config"
    )


class _UnexpectedError(MloptError, ValueError):
    """A value of another kind than it must be."""


def _expect(good: bool, value: Any, kind: str) -> Any:
    if not good:
        raise _UnexpectedError(f"={shown(value)}; it must be {kind}")
    return value


def _converter() -> cattrs.Converter:
    """Return a converter that takes values as they stand: cattrs alone would read "3" as 3, and "ab" as ("a", "b")."""
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

    @converter.register_structure_hook_factory(lambda kind: get_origin(kind) is Literal)
    def choice(kind: Any) -> Any:
        expected = f"one of {', '.join(map(repr, get_args(kind)))}"
        return lambda value, _: _expect(isinstance(value, str) and value in get_args(kind), value, expected)

    @converter.register_structure_hook_factory(lambda kind: get_origin(kind) is tuple)
    def sequence(kind: Any, converter: cattrs.Converter) -> Any:
        structure = homogenous_tuple_structure_factory(kind, converter)
        return lambda value, _: structure(_expect(isinstance(value, list), value, "a list"), kind)

    @converter.register_structure_hook_factory(attrs.has)
    def section(kind: Any, converter: cattrs.Converter) -> Any:
        structure = make_dict_structure_fn(kind, converter, _cattrs_forbid_extra_keys=True)
        return lambda value, _: structure(_expect(isinstance(value, dict), value, "a table of keys"), kind)

    return converter


def _scalar(kind: Any, accepted: tuple[type, ...], name: str) -> Any:
    return lambda value, _: kind(_expect(type(value) in accepted, value, name))


def _is_path(value: Any) -> bool:
    """Say whether a value is text that the file system can take: JSON can write half a character, and a NUL."""
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def _complaints(error: Exception, kind: type) -> list[str]:
    """Return what is wrong with a file, each with its place in it."""
    complaints = []
    for line in cattrs.transform_error(error, path="", format_exception=partial(_complaint, kind)):
        text, _, path = line.rpartition(" @ ")
        complaints.append(f"{path.removeprefix('.') or 'the configuration'}{text}")
    return complaints


def _complaint(kind: type, error: BaseException, _: type | None) -> str:
    if isinstance(error, _UnexpectedError):
        return str(error)
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        return "; ".join(_unknown(key, error.cl, kind) for key in sorted(error.extra_fields))
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
