"""The configuration of a run on molecules: typed, read from a TOML or JSON file, overridden by the command line."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import attrs
import cattrs
import tyro
from cattrs.cols import homogenous_tuple_structure_factory
from cattrs.gen import make_dict_structure_fn
from tyro.conf import arg

from mlopt.validation import at_least, shown

from ..recipe import Settings
from .objectives import OBJECTIVES

__all__ = ["CommandLine", "Configuration", "ConfigurationError", "Data", "Encoder", "parse", "read", "write"]

_FILE, _FOLDER, _CSV = "FILE", "FOLDER", "FILE.csv"
_OBJECTIVES_HELP = (
    f"what to pretrain on, at least two; their weights are learned. There are {', '.join(OBJECTIVES)} "
    "(a control that should get little weight)."
)
_LARGEST_SEED = 2**32 - 1  # numpy's


class ConfigurationError(ValueError):
    """A configuration that cannot be run; the message says which key, what was found and what it may be."""


def _distinct(instance: object, attribute: attrs.Attribute[Any], value: tuple[Any, ...]) -> None:
    if not value or len(set(value)) < len(value):
        raise ConfigurationError(f"{attribute.name}={shown(list(value))}; give at least one, and each once")


def _seeds(instance: object, attribute: attrs.Attribute[Any], value: tuple[int, ...]) -> None:
    _distinct(instance, attribute, value)
    if not 0 <= min(value) <= max(value) <= _LARGEST_SEED:
        raise ConfigurationError(
            f"{attribute.name}={shown(list(value))}; seeds are whole numbers from 0 to {_LARGEST_SEED}"
        )


@attrs.frozen(kw_only=True)
class Data:
    """The molecules: an unlabelled corpus, and a task's labelled ones.

    Args:
        corpus: unlabelled molecules to pretrain on: .csv with a column "smiles", or .smi or .txt with a SMILES a line; also
            gzipped (.gz).
        corpus_limit: how many molecules of the corpus to read, from its start.
        train: labelled molecules: .csv or .csv.gz with a column "smiles" and columns of labels. It is split 8:1:1 into training,
            validation and test unless --valid and --test are given.
        valid: labelled molecules for validation; with --test.
        test: labelled molecules for the final score; with --valid.
        dataset: a MoleculeNet data set in place of --train, such as ESOL, BACE or Tox21; fetched where it is missing.
        root: where MoleculeNet's data sets are, or will be put.
        labels: the columns to predict.
        kind: whether the labels are classes 0 and 1, or numbers.
        metric: the score: roc_auc for classification, rmse or mae for regression, in the labels' unit.
        split: how to split --train or --dataset: so that no scaffold is in two splits, or at random by the seed.
        chirality: tell scaffolds apart that differ in stereochemistry.
        strict: stop at a SMILES that cannot be read in --corpus or the labelled files, instead of leaving its row out.
    """

    corpus: Annotated[Path | None, arg(metavar=_FILE, help_behavior_hint="(required)")] = None
    corpus_limit: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all)")] = attrs.field(
        default=None, validator=attrs.validators.optional(at_least(2))
    )
    train: Annotated[Path | None, arg(metavar=_CSV, help_behavior_hint="(required, or --dataset)")] = None
    valid: Annotated[Path | None, arg(metavar=_CSV, help_behavior_hint="(default: split --train)")] = None
    test: Annotated[Path | None, arg(metavar=_CSV, help_behavior_hint="(default: split --train)")] = None
    dataset: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: none)")] = None
    root: Annotated[Path, arg(metavar=_FOLDER)] = Path("data")
    labels: Annotated[
        tuple[str, ...] | None, arg(metavar="COLUMN [COLUMN ...]", help_behavior_hint='(default: all but "smiles")')
    ] = None
    kind: Annotated[
        Literal["classification", "regression"] | None,
        arg(metavar="{classification,regression}", help_behavior_hint="(default: as the labels are)"),
    ] = None
    metric: Annotated[
        Literal["roc_auc", "rmse", "mae"] | None,
        arg(metavar="{roc_auc,rmse,mae}", help_behavior_hint="(default: roc_auc or rmse)"),
    ] = None
    split: Literal["scaffold", "random"] = "scaffold"
    chirality: bool = True
    strict: bool = False


@attrs.frozen(kw_only=True)
class Encoder:
    """The graph network that is pretrained (GINE).

    Args:
        width: numbers that represent an atom, and a molecule.
        layers: message-passing layers: how many bonds far an atom sees.
        dropout: share of the features dropped after each layer in training, from 0 to below 1.
        norm: normalisation after each layer: over the batch, or over the features of an atom.
        pooling: how the atoms of a molecule are joined.
        residual: add each layer's input to its output.
    """

    width: int = attrs.field(default=128, validator=at_least(1))
    layers: int = attrs.field(default=4, validator=at_least(1))
    dropout: float = attrs.field(default=0.0, validator=at_least(0.0))
    norm: Literal["batch", "layer"] = "batch"
    pooling: Literal["mean", "sum"] = "mean"
    residual: bool = False


@attrs.frozen(kw_only=True)
class Configuration:
    """A whole run: what `config.json` in a result's folder holds.

    Args:
        output: where the result is written: weights, scores, history, picture, encoder and configuration.
        steps: pretraining steps, each on one batch of the corpus.
        seeds: of everything random, also of a random split. With several, each is a run of its own, in a folder seed-N inside the
            output folder, and means and standard deviations over the runs are told as well.
        objectives: what to pretrain on; their weights are learned. At least two.
        baselines: what to compare with: finetuning without pretraining, and pretraining with equal weights.
        device: where to compute; auto is a GPU where there is one.
        data: The molecules: an unlabelled corpus to pretrain on, and labelled ones, the task.
        settings: Training: how the weights are learned, and how the result is finetuned and scored.
        encoder: The graph network that is pretrained (GINE).
    """

    output: Annotated[Path | None, arg(metavar=_FOLDER, help_behavior_hint="(required)")] = None
    steps: int = attrs.field(default=2_000, validator=at_least(1))
    seeds: Annotated[tuple[int, ...], arg(metavar="N [N ...]", aliases=["--seed"])] = attrs.field(
        default=(0,), validator=_seeds
    )
    objectives: Annotated[tuple[Literal[*OBJECTIVES], ...], arg(metavar="NAME [NAME ...]", help=_OBJECTIVES_HELP)] = (
        attrs.field(default=tuple(name for name in OBJECTIVES if name != "random_labels"), validator=_distinct)
    )
    baselines: Annotated[tuple[Literal["direct", "equal"], ...], arg(metavar="[{direct,equal} ...]")] = (
        "direct",
        "equal",
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    data: Data = attrs.field(factory=Data)
    settings: Settings = attrs.field(factory=Settings)
    encoder: Encoder = attrs.field(factory=Encoder)

    def check(self) -> None:
        """Refuse what can be told before anything is read: reading a corpus takes a while.

        Raises:
            ConfigurationError: a required key is missing, or two keys do not go together.
            ValueError: there are too few steps.
        """
        data, settings = self.data, self.settings
        for path, value in (("output", self.output), ("data.corpus", data.corpus)):
            if value is None:
                raise _missing(path)
        if (data.train is None) == (data.dataset is None):
            raise ConfigurationError(
                "give either --train FILE.csv (`train` in [data]) or --dataset NAME (`dataset` in [data])"
            )
        unused = [name for name in ("valid", "test", "labels") if getattr(data, name) is not None]
        if data.dataset is not None and unused:
            raise ConfigurationError(
                f"--{unused[0]} goes with --train; a MoleculeNet data set has its own labels and is split"
            )
        if len(self.objectives) < 2:
            raise ConfigurationError(f"objectives={list(self.objectives)}; there is something to weigh from two on")
        settings.schedule(self.steps)

    def resolved(self, *, output: Path, seeds: tuple[int, ...], device: str) -> Configuration:
        """Return the configuration of a run as it was, with absolute paths, to be repeated from any folder."""
        paths = {name: getattr(self.data, name) for name in ("corpus", "train", "valid", "test", "root")}
        data = attrs.evolve(self.data, **{name: path and path.absolute() for name, path in paths.items()})
        given = {field.name: getattr(self, field.name) for field in attrs.fields(Configuration)}
        return Configuration(**{**given, "data": data, "output": output.absolute(), "seeds": seeds, "device": device})


@attrs.frozen(kw_only=True)
class CommandLine(Configuration):
    """Pretrain a graph network for a molecular task, learning how much each objective should weigh.

    Args:
        config: a TOML or JSON file with any of these options, such as the config.json of an earlier result; the command line
            overrides it. Paths in it are relative to the current folder.
        overwrite: replace the result that --output holds.
    """

    config: Annotated[Path | None, arg(metavar=_FILE, help_behavior_hint="(default: none)")] = None
    overwrite: bool = False


def parse(arguments: Sequence[str], *, prog: str) -> CommandLine:
    """Return the configuration of a command line: its own options, else those of its `--config`, else the defaults.

    Raises:
        ConfigurationError: the file cannot be used, or an option has a wrong value.
        SystemExit: after `--help`, and arguments that cannot be parsed.
    """
    first = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    file = first.parse_known_args(arguments)[0].config
    start = Configuration() if file is None else read(file)
    fields = {field.name: getattr(start, field.name) for field in attrs.fields(Configuration)}
    return tyro.cli(
        CommandLine, args=arguments, default=CommandLine(**fields), config=(tyro.conf.OmitArgPrefixes,), prog=prog
    )


def read(file: Path) -> Configuration:
    """Read a configuration file.

    Args:
        file: .toml or .json.

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
        return _CONVERTER.structure(content, Configuration)
    except (cattrs.BaseValidationError, _UnexpectedError) as error:
        raise ConfigurationError(f"{file}: {'; '.join(_complaints(error))}") from error


def write(configuration: Configuration, file: Path) -> None:
    """Write a configuration as JSON, for `read`."""
    content = _CONVERTER.unstructure(configuration, Configuration)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _missing(path: str) -> ConfigurationError:
    section, _, name = path.rpartition(".")
    return ConfigurationError(
        f"--{name} is missing; give it, or `{name}`{f' in [{section}]' if section else ''} in --config"
    )


class _UnexpectedError(ValueError):
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


def _complaints(error: Exception) -> list[str]:
    """Return what is wrong with a file, each with its place in it."""
    complaints = []
    for line in cattrs.transform_error(error, path="", format_exception=_complaint):
        text, _, path = line.rpartition(" @ ")
        complaints.append(f"{path.removeprefix('.') or 'the configuration'}{text}")
    return complaints


def _complaint(error: BaseException, _: type | None) -> str:
    if isinstance(error, _UnexpectedError):
        return str(error)
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        return "; ".join(_unknown(key, error.cl) for key in sorted(error.extra_fields))
    return f": {error}"


def _unknown(key: str, section: type) -> str:
    own = {name: name for name in attrs.fields_dict(section)}
    places = {name: f"{part}.{name}" for part, kind in _SECTIONS.items() for name in attrs.fields_dict(kind)}
    near = [known[name] for known in (own, places) for name in difflib.get_close_matches(key, known, n=1)]
    return (
        f" has no key {shown(key)}; did you mean {near[0]!r}?"
        if near
        else f" has no key {shown(key)}; it has {', '.join(own)}"
    )


_SECTIONS = {"data": Data, "settings": Settings, "encoder": Encoder}
_CONVERTER = _converter()
