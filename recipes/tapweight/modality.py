"""The contract of a modality: its configuration, and how it builds TapWeight from data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, Self, TypeVar

import attrs
import torch
from tyro.conf import arg

from mlopt.validation import at_least, shown

from .configuration import ConfigurationError
from .examples import Skipped
from .files import DataError
from .idle import Idle, refuse_idle
from .methods import DEFAULT, METHODS, USED_BY, make_method
from .names import suggestion
from .recipe import TapWeight
from .settings import Settings
from .splits import EIGHT_ONE_ONE, check_fractions, folder_split
from .tables import is_folder, parts_of
from .task import ClassWeights, Split

__all__ = ["Configuration", "Device", "LabelledData", "Modality", "device_of", "objectives_field", "objectives_option"]

_FILE, _FOLDER = "FILE", "FOLDER"
Device = Literal["auto", "cpu", "cuda"]
_LARGEST_SEED = 2**32 - 1  # numpy's
#: The objective that should get little weight. It is not among the objectives of a run unless it is named.
_CONTROL = "random_labels"


def device_of(name: Device) -> Literal["cpu", "cuda"]:
    """Return the device to compute on.

    Raises:
        ConfigurationError: there is no such device.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigurationError("device='cuda', but PyTorch finds no GPU here; give 'cpu' or 'auto'")
    return ("cuda" if available else "cpu") if name == "auto" else name


def _distinct(instance: object, attribute: attrs.Attribute[Any], value: tuple[Any, ...]) -> None:
    """Validate that there is at least one entry, and no entry twice."""
    if not value or len(set(value)) < len(value):
        raise ConfigurationError(f"{attribute.name}={shown(list(value))}; give at least one, and none twice")


def _seeds(instance: object, attribute: attrs.Attribute[Any], value: tuple[int, ...]) -> None:
    _distinct(instance, attribute, value)
    if not 0 <= min(value) <= max(value) <= _LARGEST_SEED:
        raise ConfigurationError(
            f"{attribute.name}={shown(list(value))}; seeds are whole numbers from 0 to {_LARGEST_SEED}"
        )


def _methods(instance: object, attribute: attrs.Attribute[Any], value: tuple[str, ...]) -> None:
    _distinct(instance, attribute, value)
    for name in value:
        try:
            make_method(name)
        except ValueError as error:
            raise ConfigurationError(f"{attribute.name}: {error}") from None


def _fractions(instance: object, attribute: attrs.Attribute[Any], value: tuple[float, ...]) -> None:
    try:
        check_fractions(value)
    except DataError as error:
        raise ConfigurationError(f"{attribute.name}={shown(list(value))}: {error}") from None


def objectives_option(names: Sequence[str]) -> Any:
    """Return the option on the command line that takes some of these objectives."""
    text = (
        f"the objectives to pretrain on, at least two; their weights are learned. Available: {', '.join(names)} "
        "(a control that should get little weight)."
    )
    return arg(metavar="NAME [NAME ...]", help=text)


def objectives_field(names: Sequence[str], default: Sequence[str] | None = None) -> Any:
    """Return the field of a configuration that holds some of these objectives.

    Args:
        names: the objectives that there are.
        default: those of a run that names none; all but the control when None.
    """
    if default is None:
        default = [name for name in names if name != _CONTROL]

    def known(instance: object, attribute: attrs.Attribute[Any], value: tuple[str, ...]) -> None:
        _distinct(instance, attribute, value)
        for name in value:
            if name not in names:
                raise ConfigurationError(
                    f"{attribute.name}: there is no objective {shown(name)}{suggestion(name, names)}"
                )

    return attrs.field(default=tuple(default), validator=known)


@attrs.frozen(kw_only=True)
class LabelledData:
    """The files of every modality: an unlabelled corpus, and the labelled examples of a task."""

    corpus: Path | None = None
    corpus_limit: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all)")] = attrs.field(
        default=None, validator=attrs.validators.optional(at_least(2))
    )
    train: Annotated[Path | None, arg(metavar=_FILE, help_behavior_hint="(required, or --dataset)")] = None
    valid: Annotated[Path | None, arg(metavar=_FILE, help_behavior_hint="(default: split --train)")] = None
    test: Annotated[Path | None, arg(metavar=_FILE, help_behavior_hint="(default: split --train)")] = None
    dataset: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: none)")] = None
    kind: Annotated[
        Literal["classification", "regression"] | None,
        arg(metavar="{classification,regression}", help_behavior_hint="(default: inferred from the labels)"),
    ] = None
    class_weights: ClassWeights = "none"
    missing: Annotated[
        tuple[str, ...], arg(metavar="VALUE [VALUE ...]", help_behavior_hint="(default: empty cells)")
    ] = ()
    split_fractions: Annotated[tuple[float, ...], arg(metavar="TRAIN VALID TEST")] = attrs.field(
        default=EIGHT_ONE_ONE, validator=_fractions
    )
    split_column: Annotated[str | None, arg(metavar="COLUMN", help_behavior_hint="(default: none)")] = None
    splits: Annotated[Path | None, arg(metavar=_FILE, help_behavior_hint="(default: none)")] = None
    strict: bool = False

    #: The options that have no effect beside --dataset.
    beside_dataset: ClassVar[tuple[str, ...]] = ("valid", "test", "split_column", "missing", "labels")

    def check(self) -> None:
        """Refuse options that exclude one another.

        Raises:
            ConfigurationError: two options exclude one another; the message names them.
        """
        if (self.train is None) == (self.dataset is None):
            raise ConfigurationError(
                "give either --train FILE (`train` in [data]) or --dataset NAME (`dataset` in [data])"
            )
        if (self.valid is None) != (self.test is None):
            present, missing = ("test", "valid") if self.valid is None else ("valid", "test")
            raise ConfigurationError(
                f"--{present} is given without --{missing}; give both, or neither to split the training file"
            )
        ways = [name for name in ("valid", "split_column", "splits") if getattr(self, name) is not None]
        if len(ways) > 1:
            first, second = (f"--{name.replace('_', '-')}" for name in ways[:2])
            raise ConfigurationError(f"{first} and {second} cannot be combined; give only one of them")

    @classmethod
    def idle(cls) -> Iterator[Idle]:
        """Yield the options of the data that have no effect in some runs."""
        own, divide = "of --dataset, which has its own", ("split", "split_fractions")
        yield Idle(
            cls.beside_dataset, lambda run: run.data.dataset is not None, f"on the data set {own}", "give --train"
        )
        yield Idle(
            divide,
            lambda run: run.data.valid is not None,
            "with --valid and --test, which are the splits",
            "leave out --valid and --test",
        )
        yield Idle(
            divide,
            lambda run: run.data.split_column is not None,
            "with --split-column, which names the split of each row",
            "leave out --split-column",
        )
        yield Idle(
            divide, lambda run: run.data.splits is not None, "with --splits, which lists them", "leave out --splits"
        )
        yield Idle(
            (*divide, "split_column", "splits"),
            lambda run: run.data.holds_splits(),
            "on a folder --train with a data set for each split",
            "give one of its data sets as --train",
        )

    def divided_already(self) -> bool:
        """Return True if the examples are not divided with --split."""
        return self.holds_splits() or any(each is not None for each in (self.valid, self.split_column, self.splits))

    def holds_splits(self) -> bool:
        """Return True if --train alone is a folder with a data set for each split."""
        return self.train is not None and self.valid is None and is_folder(self.train) and bool(parts_of(self.train))

    def files(self, say: Callable[[str], None]) -> dict[Split, Path]:
        """Return the files of the labelled examples: "train" alone, which is to be split, or three.

        Args:
            say: prints a sentence if --train is a folder with a data set for each split.

        Raises:
            DataError: the folder lacks a split.
        """
        given: dict[Split, Path | None] = {"train": self.train, "valid": self.valid, "test": self.test}
        files = {name: path for name, path in given.items() if path is not None}
        folder = self.train
        if folder is None or not self.holds_splits():
            return files
        split = folder_split(folder)
        rest = ", ".join(part for part in parts_of(folder) if folder / part not in split.values())
        named = ", ".join(path.name for path in split.values())
        say(f"Splits: {named} of {folder}{f'; not read: {rest}' if rest else ''}.")
        return split


D = TypeVar("D", bound=LabelledData)
E = TypeVar("E", bound=attrs.AttrsInstance)


@attrs.frozen(kw_only=True)
class Configuration(Generic[D, E]):
    """A whole run: the contents of `config.json` in a result's folder.

    Args:
        output: the folder of the result: weights, scores, history, picture, encoder and configuration.
        steps: pretraining steps, each on one batch of the corpus.
        seeds: seeds of all random numbers, those of a random split included. Several seeds are separate runs, in folders seed-N
            inside the output folder; their means and standard deviations are reported as well.
        methods: the methods to compare. The last is the main one, whose encoder and weights are saved. "single:OBJECTIVE"
            pretrains on one objective.
        device: the device to compute on; auto is a GPU if there is one.
        checkpoint_every: steps of each phase from one checkpoint in the output folder to the next.
        objectives: at least two; their weights are learned.
        data: an unlabelled corpus to pretrain on, and the labelled examples of the task.
        settings: Training: the learning of the weights, and the finetuning and scoring of the result.
        encoder: the encoder that is pretrained.
    """

    output: Annotated[Path | None, arg(metavar=_FOLDER, help_behavior_hint="(required)")] = None
    steps: int = attrs.field(default=2_000, validator=at_least(1))
    seeds: Annotated[tuple[int, ...], arg(metavar="N [N ...]", aliases=["--seed"])] = attrs.field(
        default=(0,), validator=_seeds
    )
    methods: Annotated[tuple[str, ...], arg(metavar=f"{{{','.join(METHODS)},single:OBJECTIVE}} [...]")] = attrs.field(
        default=DEFAULT, validator=_methods
    )
    device: Device = "auto"
    checkpoint_every: int = attrs.field(default=100, validator=at_least(1))
    objectives: tuple[str, ...]
    data: D
    settings: Settings
    encoder: E

    #: The options that must be given, as paths of keys.
    required: ClassVar[tuple[str, ...]] = ("output",)

    def check(self, written: Mapping[str, str] | None = None) -> None:
        """Refuse a run that is not possible, before any data are read: reading a corpus takes a while.

        Args:
            written: the options that the command line names, as they are written, by their keys.

        Raises:
            ConfigurationError: a required key is missing, two keys exclude one another, or one has no effect.
            ValueError: there are too few steps.
        """
        for path in self.required:
            section, _, name = path.rpartition(".")
            if getattr(getattr(self, section) if section else self, name) is None:
                place = f" in [{section}]" if section else ""
                raise ConfigurationError(f"--{name} is missing; give it, or `{name}`{place} in --config")
        self.data.check()
        if len(self.objectives) < 2:
            raise ConfigurationError(f"objectives={list(self.objectives)}; give at least two")
        self.settings.schedule(self.steps)
        for name in self.methods:
            make_method(name).check(self.settings, self.steps, self.objectives)
        refuse_idle(self, [*self.data.idle(), *map(_unused, USED_BY)], written or {})

    def resolved(self, *, output: Path, seeds: tuple[int, ...], device: Device) -> Self:
        """Return the configuration with absolute paths, which repeats the run from any folder."""
        changed: dict[str, Any] = {name: _absolute(getattr(self, name)) for name in ("data", "encoder")}
        return attrs.evolve(self, **changed, output=output.absolute(), seeds=seeds, device=device)


def _absolute(section: Any) -> Any:
    """Return a section of a configuration with absolute paths."""
    values = {field.name: getattr(section, field.name) for field in attrs.fields(type(section))}
    return attrs.evolve(section, **{name: path.absolute() for name, path in values.items() if isinstance(path, Path)})


def _unused(options: tuple[str, ...]) -> Idle:
    """Return the row of options that only some methods use."""
    methods = USED_BY[options]
    return Idle(
        options,
        lambda run: not any(name.partition(":")[0] in methods for name in run.methods),
        "on the methods of this run",
        f"name in --methods a method that uses it, such as {methods[0]}",
    )


C = TypeVar("C", bound=Configuration[Any, Any])


class Modality(ABC, Generic[C]):
    """A kind of examples, such as molecules or text.

    The class describes the modality; an object of it holds the data of one configuration.

    Args:
        configuration: the checked configuration of the run.
        say: a function that prints a sentence.

    Attributes:
        skipped: the rows that were left out of each file.
        name: the name of the modality on the command line.
        extra: the optional dependencies that it needs.
        summary: a sentence for the help of the command.
        configuration_class: the class of its configurations; its objectives are those that `build` can make.

    Raises:
        ValueError: the data cannot be used.
    """

    name: ClassVar[str]
    extra: ClassVar[str]
    summary: ClassVar[str]
    configuration_class: type[C]

    def __init__(self, configuration: C, say: Callable[[str], None]) -> None:
        self.configuration = configuration
        self.skipped: list[tuple[str, Sequence[Skipped]]] = []
        self.read(say)

    @abstractmethod
    def read(self, say: Callable[[str], None]) -> None:
        """Read the data of the configuration: the labelled ones first, since they are few and their errors show at once."""

    @abstractmethod
    def build(self, seed: int, device: str) -> TapWeight:
        """Return the recipe of a seed, as a run of this seed alone would have it."""
