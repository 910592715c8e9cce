"""Molecules as a modality: `mlopt tapweight molecules`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import attrs
from tyro.conf import arg

from mlopt.rng import seed_everything
from mlopt.validation import at_least

from ..command import command
from ..modality import Configuration, LabelledData, Modality, objectives_field, objectives_option
from ..recipe import TapWeight
from ..settings import Settings
from .data import molecule_net, read_corpus
from .encoder import GINE
from .objectives import DEFAULT, OBJECTIVES, make_objective
from .task import MoleculeTask

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Data", "EncoderSettings", "MoleculeConfiguration", "MoleculeModality", "main"]


@attrs.frozen(kw_only=True)
class Data(LabelledData):
    """The molecules: an unlabelled corpus to pretrain on, and labelled ones, the task.

    Args:
        corpus: unlabelled molecules to pretrain on: .csv with a column "smiles", or .smi or .txt with a SMILES a line; also
            gzipped (.gz).
        corpus_limit: the number of molecules of the corpus to read, from its start.
        train: labelled molecules: .csv or .csv.gz with a column "smiles" and columns of labels. It is split 8:1:1 into training,
            validation and test unless --valid and --test are given.
        valid: labelled molecules for validation; requires --test.
        test: labelled molecules for the final score; requires --valid.
        dataset: a MoleculeNet data set in place of --train, such as ESOL, BACE or Tox21; fetched if it is missing.
        root: the folder of MoleculeNet's data sets.
        labels: the columns to predict.
        kind: classification if the labels are the classes 0 and 1, regression if they are numbers.
        metric: the score: roc_auc for classification, rmse or mae for regression, in the labels' unit.
        split: the split of --train or --dataset: no scaffold is in two splits, or at random by the seed.
        chirality: distinguish scaffolds that differ in stereochemistry only.
        class_weights: balanced weighs each class in the loss of the task by the inverse of its frequency.
        strict: stop at a SMILES that cannot be read in --corpus or the labelled files, instead of leaving its row out.
    """

    file_options: ClassVar[tuple[str, ...]] = ("valid", "test", "labels")

    corpus: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(required)")] = None
    root: Annotated[Path, arg(metavar="FOLDER")] = Path("data")
    labels: Annotated[
        tuple[str, ...] | None, arg(metavar="COLUMN [COLUMN ...]", help_behavior_hint='(default: all but "smiles")')
    ] = None
    metric: Annotated[
        Literal["roc_auc", "rmse", "mae"] | None,
        arg(metavar="{roc_auc,rmse,mae}", help_behavior_hint="(default: roc_auc or rmse)"),
    ] = None
    split: Literal["scaffold", "random"] = "scaffold"
    chirality: bool = True


@attrs.frozen(kw_only=True)
class EncoderSettings:
    """The graph network that is pretrained (GINE).

    Args:
        width: numbers that represent an atom, and a molecule.
        layers: message-passing layers, each of which extends an atom's view by one bond.
        dropout: share of the features dropped after each layer in training, from 0 to below 1.
        norm: normalisation after each layer: over the batch, or over the features of an atom.
        pooling: the representation of a molecule, from those of its atoms.
        residual: add each layer's input to its output.
    """

    width: int = attrs.field(default=128, validator=at_least(1))
    layers: int = attrs.field(default=4, validator=at_least(1))
    dropout: float = attrs.field(default=0.0, validator=at_least(0.0))
    norm: Literal["batch", "layer"] = "batch"
    pooling: Literal["mean", "sum"] = "mean"
    residual: bool = False


@attrs.frozen(kw_only=True)
class MoleculeConfiguration(Configuration[Data, EncoderSettings]):
    """A whole run on molecules."""

    required: ClassVar[tuple[str, ...]] = ("output", "data.corpus")

    objectives: Annotated[tuple[str, ...], objectives_option(tuple(OBJECTIVES))] = objectives_field(
        tuple(OBJECTIVES), DEFAULT
    )
    data: Data = attrs.field(factory=Data)
    settings: Settings = attrs.field(factory=Settings)
    encoder: EncoderSettings = attrs.field(factory=EncoderSettings)


class MoleculeModality(Modality[MoleculeConfiguration]):
    """Molecules: graphs from SMILES, a graph network, and properties to predict."""

    name, extra = "molecules", "molecules"
    summary = "Pretrain a graph network for a molecular task, learning how much each objective should weigh."
    configuration_class = MoleculeConfiguration

    def read(self, say: Callable[[str], None]) -> None:
        """Read the labelled molecules and the corpus."""
        data = self.configuration.data
        self._tasks = {seed: self._task(seed) for seed in self.configuration.seeds}
        assert data.corpus is not None  # checked
        self._corpus = read_corpus(data.corpus, strict=data.strict, limit=data.corpus_limit)
        say(f"Corpus: {self._corpus.summary()}.")

    def build(self, seed: int, device: str) -> TapWeight:
        """Return the recipe of a seed."""
        seed_everything(seed)
        return TapWeight(
            GINE(**attrs.asdict(self.configuration.encoder)).to(device),
            [make_objective(name) for name in self.configuration.objectives],
            self._tasks[seed],
            self._corpus.copy(),
            settings=self.configuration.settings,
            seed=seed,
        )

    def _task(self, seed: int) -> MoleculeTask:
        data = self.configuration.data
        names = ("kind", "split", "chirality", "metric", "class_weights")
        options: dict[str, Any] = {name: getattr(data, name) for name in names} | {"seed": seed}
        if data.dataset is not None:
            return MoleculeTask.from_molecules(molecule_net(data.dataset, data.root), **options)
        assert data.train is not None  # checked
        files: dict[str, Any] = {name: getattr(data, name) for name in ("valid", "test", "labels", "strict")}
        return MoleculeTask.from_csv(data.train, **files, **options)


main = partial(command, MoleculeModality)
