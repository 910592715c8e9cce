"""The configuration of a run on molecules: typed, read from a TOML or JSON file, overridden by the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import attrs
from tyro.conf import arg

from mlopt.validation import at_least

from .. import configuration as reader
from ..configuration import ConfigurationError, Options, Run, distinct, missing, write
from ..recipe import Settings
from .objectives import OBJECTIVES

__all__ = ["CommandLine", "Configuration", "ConfigurationError", "Data", "Encoder", "parse", "read", "write"]

_FILE, _FOLDER, _CSV = "FILE", "FOLDER", "FILE.csv"
_OBJECTIVES_HELP = (
    f"what to pretrain on, at least two; their weights are learned. There are {', '.join(OBJECTIVES)} "
    "(a control that should get little weight)."
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
class Configuration(Run):
    """A whole run: what `config.json` in a result's folder holds.

    Args:
        objectives: what to pretrain on; their weights are learned. At least two.
        data: The molecules: an unlabelled corpus to pretrain on, and labelled ones, the task.
        settings: Training: how the weights are learned, and how the result is finetuned and scored.
        encoder: The graph network that is pretrained (GINE).
    """

    objectives: Annotated[tuple[Literal[*OBJECTIVES], ...], arg(metavar="NAME [NAME ...]", help=_OBJECTIVES_HELP)] = (
        attrs.field(default=tuple(name for name in OBJECTIVES if name != "random_labels"), validator=distinct)
    )
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
                raise missing(path)
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
class CommandLine(Options, Configuration):
    """Pretrain a graph network for a molecular task, learning how much each objective should weigh."""


def parse(arguments: Sequence[str], *, prog: str) -> CommandLine:
    """Return the configuration of a command line; see `mlopt.recipes.tapweight.configuration.parse`."""
    return reader.parse(arguments, CommandLine, Configuration, prog=prog)


def read(file: Path) -> Configuration:
    """Read a configuration file; see `mlopt.recipes.tapweight.configuration.read`."""
    return reader.read(file, Configuration)
