"""A downstream task on molecules: predict properties, some of whose labels may be missing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..cells import label_text
from ..files import DataError
from ..labels import Form, Kind
from ..properties import Properties, PropertyTask, Words
from ..repetition import repetitions, shared
from ..splits import EIGHT_ONE_ONE, listed_split, named_split
from ..task import ClassWeights, Split
from .data import Molecules, molecule_table, read_table
from .graphs import canonical
from .joining import join
from .predictor import Predictor, linear_head
from .splitting import Method, divided

if TYPE_CHECKING:
    import os
    from collections.abc import Hashable, Iterable, Mapping, Sequence
    from pathlib import Path

    from torch_geometric.data import Batch, Data

    from ..encoder import Encoder
    from ..predictor import Member

_FORMS: dict[Kind, Form] = {"classification": "binary", "regression": "numbers"}
_WORDS = Words(
    example="molecule", otherwise="give --split stratified, random or balanced, other --split-fractions, or other files"
)


class MoleculeTask(PropertyTask):
    """Predict one or several properties of molecules; labels may be missing.

    Regression labels are standardised, task by task, by the mean and the (population) standard deviation of the
    training split; the head predicts standardised values, and metrics are in the labels' unit.

    Args:
        splits: labelled molecules of "train", "valid" and "test"; each graph has `y` (1, T), NaN if missing.
        label_names: the T tasks.
        kind: "classification" (labels 0 and 1, one logit a task) or "regression"; by default classification if all
            labels are 0 or 1.
        class_column: the name of the one task whose classes the columns are, if each molecule has one of them.
        class_names: the names of the classes 0 and 1 of each task, for predictions; by default "0" and "1".
        metric: the name of a metric of `mlopt.recipes.tapweight.metrics`; by default "roc_auc" for classification, "rmse" for
            regression. The mean over tasks.
        dropout: probability of dropping a feature before the head's linear layer.
        class_weights: "balanced" weighs each label in the loss by N / (2 N_c): its task has N training labels, N_c of them of the
            same class. "none" does not.
        remarks: sentences about the data, to which the constructor adds its own.

    Attributes:
        remarks: sentences that a user should read, such as rows left out or a split that has one class only.
        mean: (T,) float64, of the training labels; 0 for classification.
        std: (T,) float64, of the training labels; 1 for classification.

    Raises:
        DataError: a split has no label of a task, a label does not fit the kind, or the metric is undefined.
    """

    splits: Mapping[Split, Sequence[Data]]
    noun = "molecules"

    def __init__(
        self,
        splits: Mapping[Split, Sequence[Data]],
        *,
        label_names: Sequence[str],
        kind: Kind | None = None,
        class_column: str | None = None,
        class_names: Sequence[Sequence[str]] = (),
        metric: str | None = None,
        dropout: float = 0.0,
        class_weights: ClassWeights = "none",
        remarks: Sequence[str] = (),
    ) -> None:
        super().__init__(splits)
        if set(splits) != {"train", "valid", "test"}:
            raise DataError(f"splits={sorted(splits)}: give 'train', 'valid' and 'test'")
        self.label_names, self.class_column = tuple(label_names), class_column
        self.dropout = dropout
        labels = {split: _labels(split, examples, self.label_names) for split, examples in splits.items()}
        self.kind = kind or _infer_kind(labels.values())
        if self.kind not in _FORMS or (class_column is not None and self.kind == "regression"):
            others = "regression or " if class_column is None else ""
            raise DataError(f"kind={kind!r}: give {others}classification with --kind")
        self.form: Form = _FORMS[self.kind] if class_column is None else "classes"
        if self.kind == "classification":
            for split, examples in splits.items():
                _check_classes(split, examples, labels[split], self.label_names)
        self._properties = Properties(
            labels,
            self.label_names,
            self.form,
            _WORDS,
            metric=metric,
            column=class_column,
            pairs=class_names,
            class_weights=class_weights,
        )
        self.metric_name, self.greater_is_better = self._properties.metric_name, self._properties.greater_is_better
        self.mean, self.std = self._properties.mean, self._properties.std
        self.remarks = (*remarks, *self._properties.remarks)

    @classmethod
    def from_molecules(
        cls,
        molecules: Molecules,
        *,
        kind: Kind | None = None,
        split: Method | Mapping[Split, Sequence[int]] = "scaffold",
        fractions: Sequence[float] = EIGHT_ONE_ONE,
        chirality: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> MoleculeTask:
        """Split labelled molecules into a task.

        Args:
            molecules: labelled molecules, from `read_table` or `molecule_net`.
            split: a method, see `mlopt.recipes.tapweight.molecules.splitting.divided`, or the indices of each split.
            fractions, chirality, seed: of a method.
            kind: as in the constructor; by default, that of the labels.
            options: `metric`, `dropout` and `class_weights` of the constructor.

        Returns:
            The task.

        Raises:
            DataError: a split is empty, or as in the constructor.
        """
        if not molecules.label_names:
            raise DataError(f"{molecules.source}: there are no labels, but a task needs them; give a table with labels")
        if isinstance(split, str):
            indices: Mapping[Split, Sequence[int]] = divided(
                molecules, split, fractions, chirality=chirality, seed=seed
            )
        else:
            indices = split
        splits = {name: molecules.subset(chosen) for name, chosen in indices.items()}
        task = cls(
            splits,
            label_names=molecules.label_names,
            remarks=_remarks([molecules], {} if isinstance(split, str) else splits),
            **_meaning(molecules, kind),
            **options,
        )
        task.skipped = [(molecules.source, molecules.skipped)]
        return task

    @classmethod
    def from_csv(
        cls,
        train: str | os.PathLike[str],
        *,
        valid: str | os.PathLike[str] | None = None,
        test: str | os.PathLike[str] | None = None,
        split: Method = "scaffold",
        fractions: Sequence[float] = EIGHT_ONE_ONE,
        split_column: str | None = None,
        splits: Path | None = None,
        chirality: bool = True,
        seed: int = 0,
        kind: Kind | None = None,
        metric: str | None = None,
        dropout: float = 0.0,
        class_weights: ClassWeights = "none",
        **reading: Any,
    ) -> MoleculeTask:
        """Read a task from one file, which is split 8:1:1, or from three.

        Args:
            train, valid, test: tables of molecules, see `read_table`; those of `valid` and `test` are read as that of `train`.
            split, fractions, chirality, seed: as in `from_molecules`; for one file only.
            split_column: the column that names the split of each molecule, instead of `split`.
            splits: a file that lists the rows of each split instead, see `mlopt.recipes.tapweight.splits.listed_split`.
            kind, metric, dropout, class_weights: as in the constructor.
            reading: `labels`, `smiles_column`, `ignore`, `missing` and `strict` of `read_table`.

        Raises:
            DataError: as in `read_table`, `from_molecules` and the constructor.
        """
        molecules = read_table(train, kind=kind, **reading)
        options: dict[str, Any] = {"metric": metric, "dropout": dropout, "class_weights": class_weights}
        if valid is None and test is None:
            given: Any = split
            if splits is not None:
                given = listed_split(splits, molecules.source, molecules.record_numbers())
            elif split_column is not None:
                given = named_split(molecule_table(train), split_column, molecules.record_numbers())
            return cls.from_molecules(
                molecules, kind=kind, split=given, fractions=fractions, chirality=chirality, seed=seed, **options
            )
        if valid is None or test is None:
            present, missing = ("test", "valid") if valid is None else ("valid", "test")
            raise DataError(
                f"{present} is given without {missing}; give both --valid and --test, or neither to split the training file"
            )
        reading = {name: value for name, value in reading.items() if name in ("smiles_column", "strict")}
        files = [molecules, *(read_table(path, like=molecules, **reading) for path in (valid, test))]
        parts: dict[Split, Molecules] = {"train": files[0], "valid": files[1], "test": files[2]}
        remarks = _remarks(files, parts)
        task = cls(parts, label_names=molecules.label_names, remarks=remarks, **_meaning(molecules, kind), **options)
        task.skipped = [(table.source, table.skipped) for table in files]
        return task

    def collate(self, examples: list[Data]) -> Batch:
        """Join graphs into one disconnected graph."""
        return join(examples)

    def head(self, encoder: Encoder) -> nn.Module:
        """Build a linear layer from the encoder's graph representation (B, width) to the tasks (B, T)."""
        return linear_head(encoder.width, len(self.label_names), self.dropout)

    def outputs(self, encoder: Encoder, head: nn.Module, batch: Batch) -> Tensor:
        """Return logits, or standardised predictions, (B, T)."""
        outputs: Tensor = head(encoder.pool(batch))
        return outputs

    def targets(self, batch: Batch) -> Tensor:
        """Return the labels (B, T) in their unit, NaN if missing."""
        labels: Tensor = batch.y
        return labels

    def keys(self, split: Split) -> Sequence[Hashable]:
        """Return the canonical SMILES of each molecule that was read from a file; by default graphs are all different."""
        examples = self.splits[split]
        if not isinstance(examples, Molecules):
            return super().keys(split)
        return [canonical(smiles) for smiles in examples.smiles]

    def predictor(self, members: Sequence[Member]) -> Predictor:
        """Return the predictor of finetuned models."""
        return Predictor(members, self.target(), file_columns=getattr(self.splits["train"], "columns", ()))

    def __repr__(self) -> str:
        sizes = ", ".join(f"{split} {len(examples)}" for split, examples in self.splits.items())
        return f"MoleculeTask({self.subject()}; {self.metric_name}; {sizes})"

    def subject(self) -> str:
        """Return the kind of the task and the names of the labels."""
        return f"{self.kind} {'into' if self.form == 'classes' else 'of'} {', '.join(self.label_names)}"


def _labels(split: Split, examples: Sequence[Data], names: Sequence[str]) -> Tensor:
    """Return the labels (N, T) of a split, after checking that each example has T."""
    if not len(examples):
        raise DataError(f"the {split} split is empty; give at least one molecule")
    for index, graph in enumerate(examples):
        shape = None if graph.y is None else tuple(graph.y.shape)
        if shape != (1, len(names)):
            raise DataError(
                f"{_place(split, examples, index)}: y has the shape {shape}; it must be {(1, len(names))}, a label for each task"
            )
    return torch.cat([graph.y for graph in examples])


def _check_classes(split: Split, examples: Sequence[Data], labels: Tensor, names: Sequence[str]) -> None:
    """Check that the labels (N, T) of a split are 0, 1 or missing."""
    wrong = (~labels.isnan() & (labels != 0) & (labels != 1)).nonzero().tolist()
    if wrong:
        index, task = wrong[0]
        raise DataError(
            f"{_place(split, examples, index)}: the label {labels[index, task]:g} of task {names[task]!r} is not 0 or "
            "1; correct it, leave it empty if it is missing, or give --kind regression"
        )


def _place(split: Split, examples: Sequence[Data], index: int) -> str:
    """Return the place of an example: its file and row, if they are known."""
    if isinstance(examples, Molecules):
        return f"{examples.source}, row {examples.rows[index]}"
    return f"example {index} of the {split} split"


def _infer_kind(labels: Iterable[Tensor]) -> Kind:
    """Return "classification" if all labels are 0 or 1, else "regression"."""
    classes = all(((table == 0) | (table == 1) | table.isnan()).all() for table in labels)
    return "classification" if classes else "regression"


def _meaning(molecules: Molecules, kind: Kind | None) -> dict[str, Any]:
    """Return the kind of some molecules' labels, the name of the one column of classes, and the names of two classes."""
    numbers = any(each.form == "numbers" for each in molecules.meanings)
    column = next((each.name for each in molecules.meanings if each.form == "classes"), None)
    names = [each.classes for each in molecules.meanings if each.form == "binary"]
    return {"kind": kind or ("regression" if numbers else None), "class_column": column, "class_names": names}


def _remarks(files: Sequence[Molecules], splits: Mapping[Split, Molecules]) -> list[str]:
    """Return sentences on how files were read, on molecules listed more than once, and on those of two splits."""
    sentences = [molecules.summary() for molecules in files if molecules.skipped or molecules.notes]
    sentences += [remark for each in files[0].meanings for remark in each.remarks()]
    for molecules in files:
        labels = [[label_text(y) or None for y in graph.y[0].tolist()] for graph in molecules]
        keys = [canonical(smiles) for smiles in molecules.smiles]
        sentences += repetitions(molecules, keys, labels, molecules.label_names)
    return sentences + (shared(splits, lambda graph: canonical(graph.smiles)) if splits else [])
