"""Molecules as a modality: `mlopt tapweight molecules`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import attrs
from tyro.conf import arg

from mlopt.rng import seed_everything
from mlopt.validation import at_least, share

from ..command import command
from ..idle import Idle
from ..metrics import MetricName
from ..modality import Configuration, LabelledData, Modality, objectives_field, objectives_option
from ..recipe import TapWeight
from ..settings import Settings
from ..splits import listed_split
from .data import molecule_net, read_corpus
from .encoder import GINE
from .objectives import DEFAULT, OBJECTIVES, make_objective
from .splitting import Method
from .task import MoleculeTask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..task import Split

__all__ = ["Data", "EncoderSettings", "MoleculeConfiguration", "MoleculeModality", "main"]


#: The ways to split that compare scaffolds.
_BY_SCAFFOLD: tuple[Method, ...] = ("scaffold", "balanced")


@attrs.frozen(kw_only=True)
class Data(LabelledData):
    """The molecules: an unlabelled corpus to pretrain on, and the labelled ones of the task.

    Args:
        corpus: unlabelled molecules to pretrain on: a table with a column of SMILES (.csv, .tsv, .jsonl, .json, .parquet), .sdf,
            or .smi or .txt with a SMILES a line; also compressed (.gz, .xz, .bz2, .zip).
        corpus_limit: the number of molecules of the corpus to read, from its start.
        train: labelled molecules: a table as for --corpus, .sdf, .smi, or a folder of a data set (`datasets`), with columns of
            labels. It is split into training, validation and test unless --valid and --test are given, or the folder has a data
            set for each.
        valid: labelled molecules for validation; requires --test.
        test: labelled molecules for the final score; requires --valid.
        dataset: a MoleculeNet data set in place of --train, such as ESOL, BACE or Tox21; fetched if it is missing.
        root: the folder of MoleculeNet's data sets.
        smiles_column: the column of the SMILES; by default "smiles", else the only column that holds SMILES.
        labels: the columns to predict.
        ignore_columns: columns that are not to be predicted.
        missing: cells that mean a missing label, in addition to empty ones, such as -1.
        kind: classification if the labels are classes, regression if they are numbers.
        metric: the score: roc_auc, pr_auc, accuracy, f1 or matthews for classification (macro_f1 and micro_f1 for more than two
            classes), rmse, mae, r2, pearson or spearman for regression.
        split: how --train or --dataset is split: by scaffold, so that no scaffold is in two splits; by scaffold with equal shares
            of each class (balanced); at random; or at random with equal shares of each class (stratified).
        split_fractions: the fractions of training, validation and test.
        split_column: the column that names the split of each molecule: train, valid or test.
        splits: a splits.json of an earlier run on the same --train or --dataset.
        chirality: distinguish scaffolds that differ in stereochemistry only.
        class_weights: balanced weighs each class in the loss of the task by the inverse of its frequency.
        strict: stop at a SMILES that cannot be read in --corpus or the labelled files, instead of leaving its row out.
    """

    beside_dataset: ClassVar[tuple[str, ...]] = (*LabelledData.beside_dataset, "ignore_columns")

    corpus: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(required)")] = None
    root: Annotated[Path, arg(metavar="FOLDER")] = Path("data")
    smiles_column: Annotated[
        str | None, arg(metavar="COLUMN", help_behavior_hint='(default: "smiles", or the only column of SMILES)')
    ] = None
    labels: Annotated[
        tuple[str, ...] | None,
        arg(metavar="COLUMN [COLUMN ...]", help_behavior_hint="(default: all but SMILES, indices, identifiers, texts)"),
    ] = None
    ignore_columns: Annotated[
        tuple[str, ...], arg(metavar="COLUMN [COLUMN ...]", help_behavior_hint="(default: none)")
    ] = ()
    metric: Annotated[MetricName | None, arg(metavar="NAME", help_behavior_hint="(default: roc_auc or rmse)")] = None
    split: Method = "scaffold"
    chirality: bool = True

    @classmethod
    def idle(cls) -> Iterator[Idle]:
        """Yield the options of the data that have no effect in some runs."""
        yield from super().idle()
        yield Idle(("root",), lambda run: run.data.dataset is None, "without --dataset", "give --dataset")
        yield Idle(
            ("ignore_columns",),
            lambda run: run.data.labels is not None,
            "with --labels, which names all columns to predict",
            "leave out --labels",
        )
        yield Idle(
            ("chirality",),
            lambda run: run.data.split not in _BY_SCAFFOLD or run.data.divided_already(),
            "on a split that is not by scaffold",
            "give --split scaffold",
        )


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
    dropout: float = attrs.field(default=0.0, validator=share)
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
    summary = "Pretrain a graph network for a molecular task, and learn the weight of each objective."
    configuration_class = MoleculeConfiguration

    def read(self, say: Callable[[str], None]) -> None:
        """Read the labelled molecules and the corpus."""
        data, seeds = self.configuration.data, self.configuration.seeds
        files = data.files(say)
        self._tasks = {seed: self._task(seed, files) for seed in seeds}
        assert data.corpus is not None  # checked
        self._corpus = read_corpus(
            data.corpus,
            smiles_column=data.smiles_column,
            optional=data.train is not None,
            strict=data.strict,
            limit=data.corpus_limit,
        )
        self.skipped = [*self._tasks[seeds[0]].skipped, (self._corpus.source, self._corpus.skipped)]
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

    def _task(self, seed: int, files: dict[Split, Path]) -> MoleculeTask:
        data = self.configuration.data
        names = ("kind", "chirality", "metric", "class_weights")
        options: dict[str, Any] = {name: getattr(data, name) for name in names}
        options |= {"fractions": data.split_fractions, "seed": seed}
        if data.dataset is not None:
            molecules = molecule_net(data.dataset, data.root)
            split: Any = data.split
            if data.splits is not None:
                split = listed_split(data.splits, molecules.source, molecules.record_numbers())
            return MoleculeTask.from_molecules(molecules, split=split, **options)
        places = ("split", "split_column", "splits", "smiles_column", "labels", "missing", "strict")
        options |= {name: getattr(data, name) for name in places} | files
        return MoleculeTask.from_csv(ignore=data.ignore_columns, **options)


main = partial(command, MoleculeModality)
