"""The configuration of a run on text: typed, read from a TOML or JSON file, overridden by the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import attrs
from tyro.conf import arg

from mlopt.validation import at_least

from .. import configuration as reader
from ..configuration import ConfigurationError, Options, Run, distinct, missing, write
from ..recipe import Settings as RecipeSettings
from .objectives import OBJECTIVES

__all__ = [
    "CommandLine",
    "Configuration",
    "ConfigurationError",
    "Data",
    "Encoder",
    "Settings",
    "parse",
    "read",
    "write",
]

_FILE, _FOLDER, _TABLE = "FILE", "FOLDER", "FILE.jsonl"
_OBJECTIVES_HELP = (
    f"what to pretrain on, at least two; their weights are learned. There are {', '.join(OBJECTIVES)} "
    "(a control that should get little weight)."
)


@attrs.frozen(kw_only=True)
class Data:
    """The texts: an unlabelled corpus, and a task's labelled ones.

    Args:
        corpus: unlabelled texts to pretrain on: .txt with a document a line, or .csv or .jsonl with a column "text"; also gzipped
            (.gz).
        corpus_limit: how many texts of the corpus to read, from its start.
        train: labelled texts: .csv or .jsonl, also gzipped, with a column "text" (or "text_a" and "text_b") and a column
            "label". They are split 8:1:1 into training, validation and test at random unless --valid and --test are given.
        valid: labelled texts for validation; with --test.
        test: labelled texts for the final score; with --valid.
        dataset: a task of GLUE in place of --train, such as cola, mrpc or stsb; fetched where it is missing.
        text: the column of the text, or the two columns of a pair.
        label: the column of the label.
        kind: whether the labels are classes, or numbers.
        metric: the score: accuracy, macro_f1, micro_f1 or matthews for classification, pearson or spearman for regression.
        strict: stop at an empty text in --corpus or the labelled files, instead of leaving its row out.
    """

    corpus: Annotated[Path | None, arg(metavar=_FILE, help_behavior_hint="(default: the texts of --train)")] = None
    corpus_limit: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all)")] = attrs.field(
        default=None, validator=attrs.validators.optional(at_least(2))
    )
    train: Annotated[Path | None, arg(metavar=_TABLE, help_behavior_hint="(required, or --dataset)")] = None
    valid: Annotated[Path | None, arg(metavar=_TABLE, help_behavior_hint="(default: split --train)")] = None
    test: Annotated[Path | None, arg(metavar=_TABLE, help_behavior_hint="(default: split --train)")] = None
    dataset: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: none)")] = None
    text: Annotated[
        tuple[str, ...] | None,
        arg(metavar="COLUMN [COLUMN]", help_behavior_hint='(default: "text", or a pair\'s columns)'),
    ] = None
    label: Annotated[str, arg(metavar="COLUMN")] = "label"
    kind: Annotated[
        Literal["classification", "regression"] | None,
        arg(metavar="{classification,regression}", help_behavior_hint="(default: as the labels are)"),
    ] = None
    metric: Annotated[
        Literal["accuracy", "macro_f1", "micro_f1", "matthews", "pearson", "spearman"] | None,
        arg(metavar="NAME", help_behavior_hint="(default: accuracy or pearson)"),
    ] = None
    strict: bool = False


@attrs.frozen(kw_only=True)
class Encoder:
    """The encoder that is pretrained further, and its tokenizer.

    Args:
        model: an encoder of transformers, such as BERT, RoBERTa or DeBERTa: a folder, or a name on the Hugging Face hub. Code
            that it brings is never run.
        pooling: the representation of a text: the mean over its tokens, or its first token.
        max_length: tokens of a text, special ones counted; the rest is cut off.
        layers: how many of the encoder's layers to keep, from the first.
        dtype: of the weights. Adam's steps on bfloat16 weights are rounded.
        attention: how attention is computed: sdpa where the encoder has it, or eager.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
    """

    model: Annotated[str | None, arg(metavar="FOLDER|NAME", help_behavior_hint="(required)")] = None
    pooling: Literal["mean", "cls"] = "mean"
    max_length: int = attrs.field(default=128, validator=at_least(3))
    layers: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all)")] = attrs.field(
        default=None, validator=attrs.validators.optional(at_least(1))
    )
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Annotated[
        Literal["sdpa", "eager"] | None, arg(metavar="{sdpa,eager}", help_behavior_hint="(default: the encoder's)")
    ] = None
    gradient_checkpointing: bool = False


@attrs.frozen(kw_only=True)
class Settings(RecipeSettings):
    """The numbers of a run on text: those of the recipe, with defaults for transformers."""

    batch_size: int = attrs.field(default=16, validator=at_least(2))
    task_batch_size: int = attrs.field(default=16, validator=at_least(1))
    valid_batch_size: int = attrs.field(default=32, validator=at_least(1))
    pretraining_lr: float = attrs.field(default=5e-5, validator=at_least(0.0))
    finetuning_lr: float = attrs.field(default=5e-5, validator=at_least(0.0))
    epochs: int = attrs.field(default=5, validator=at_least(1))
    finetune_lr: float = attrs.field(default=5e-5, validator=at_least(0.0))


@attrs.frozen(kw_only=True)
class Configuration(Run):
    """A whole run: what `config.json` in a result's folder holds.

    Args:
        objectives: what to pretrain on; their weights are learned. At least two.
        data: The texts: an unlabelled corpus to pretrain on, and labelled ones, the task.
        settings: Training: how the weights are learned, and how the result is finetuned and scored.
        encoder: The encoder that is pretrained further, and its tokenizer.
    """

    objectives: Annotated[tuple[Literal[*OBJECTIVES], ...], arg(metavar="NAME [NAME ...]", help=_OBJECTIVES_HELP)] = (
        attrs.field(default=tuple(name for name in OBJECTIVES if name != "random_labels"), validator=distinct)
    )
    data: Data = attrs.field(factory=Data)
    settings: Settings = attrs.field(factory=Settings)
    encoder: Encoder = attrs.field(factory=Encoder)

    def check(self) -> None:
        """Refuse what can be told before anything is read.

        Raises:
            ConfigurationError: a required key is missing, or two keys do not go together.
            ValueError: there are too few steps.
        """
        data = self.data
        for path, value in (("output", self.output), ("encoder.model", self.encoder.model)):
            if value is None:
                raise missing(path)
        if (data.train is None) == (data.dataset is None):
            raise ConfigurationError(
                "give either --train FILE.jsonl (`train` in [data]) or --dataset NAME (`dataset` in [data])"
            )
        unused = [name for name in ("valid", "test", "text") if getattr(data, name) is not None]
        if data.dataset is not None and unused:
            raise ConfigurationError(f"--{unused[0]} goes with --train; a task of GLUE has its own")
        if (data.valid is None) != (data.test is None):
            given, lacking = ("test", "valid") if data.valid is None else ("valid", "test")
            raise ConfigurationError(
                f"--{given} is given without --{lacking}; give both, or neither to split the training file 8:1:1"
            )
        if len(self.objectives) < 2:
            raise ConfigurationError(f"objectives={list(self.objectives)}; there is something to weigh from two on")
        self.settings.schedule(self.steps)

    def resolved(self, *, output: Path, seeds: tuple[int, ...], device: str) -> Configuration:
        """Return the configuration of a run as it was, with absolute paths, to be repeated from any folder."""
        paths = {name: getattr(self.data, name) for name in ("corpus", "train", "valid", "test")}
        data = attrs.evolve(self.data, **{name: path and path.absolute() for name, path in paths.items()})
        folder = Path(self.encoder.model or "")
        encoder = attrs.evolve(self.encoder, model=str(folder.absolute())) if folder.is_dir() else self.encoder
        given = {field.name: getattr(self, field.name) for field in attrs.fields(Configuration)}
        own = {"data": data, "encoder": encoder, "output": output.absolute(), "seeds": seeds, "device": device}
        return Configuration(**{**given, **own})


@attrs.frozen(kw_only=True)
class CommandLine(Options, Configuration):
    """Pretrain an encoder of text further for a task, learning how much each objective should weigh."""


def parse(arguments: Sequence[str], *, prog: str) -> CommandLine:
    """Return the configuration of a command line; see `mlopt.recipes.tapweight.configuration.parse`."""
    return reader.parse(arguments, CommandLine, Configuration, prog=prog)


def read(file: Path) -> Configuration:
    """Read a configuration file; see `mlopt.recipes.tapweight.configuration.read`."""
    return reader.read(file, Configuration)
