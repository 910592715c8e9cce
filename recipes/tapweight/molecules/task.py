"""A downstream task on molecules: predict properties, some of whose labels may be missing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import attrs
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss
from torchmetrics import Metric
from torchmetrics.functional import mean_absolute_error, mean_squared_error
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities import dim_zero_cat

from mlopt.errors import ArgumentError

from ..files import DataError
from ..predictions import Target
from ..task import ClassWeights, Split, Task, balanced_weights, check_class_weights
from .data import Molecules, read_table
from .joining import join
from .predictor import Predictor, linear_head
from .splits import random_split, scaffold_split

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch_geometric.data import Batch, Data

    from ..encoder import Encoder
    from ..predictor import Member

Kind = Literal["classification", "regression"]


def _roc_auc(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the area under the ROC curve of outputs (N,) on any scale, for labels 0 and 1 (N,)."""
    # Ranks give the same area, and exactly so: torchmetrics would take a sigmoid of logits, which ties the large ones.
    ranks = torch.unique(outputs, return_inverse=True)[1]
    return binary_auroc(ranks.double() / len(ranks), labels.long())


def _rmse(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the root mean square error of outputs (N,) against labels (N,), in the labels' unit."""
    return mean_squared_error(outputs, labels, squared=False)


@attrs.frozen
class _Measure:
    """A metric of one task: its function, the kind of task, and the number of distinct labels that define it."""

    function: Callable[[Tensor, Tensor], Tensor]
    kind: Kind
    greater_is_better: bool
    distinct: int


_MEASURES = {  # the first of a kind is its default
    "roc_auc": _Measure(_roc_auc, "classification", True, 2),
    "rmse": _Measure(_rmse, "regression", False, 1),
    "mae": _Measure(mean_absolute_error, "regression", False, 1),
}


class TaskMean(Metric):
    """The mean over tasks of a metric, each on the examples that have its label.

    A task with too few distinct labels for the metric (one class only, for ROC-AUC) is left out.

    Args:
        name: "roc_auc", "rmse" or "mae".
        mean: (T,) the mean that standardised labels are relative to, in the labels' unit.
        std: (T,) the unit of standardised labels, in the labels' unit.
    """

    full_state_update = False
    outputs: list[Tensor]
    labels: list[Tensor]

    def __init__(self, name: str, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.name, self.mean, self.std = name, mean, std
        self.add_state("outputs", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            outputs: (B, T) logits, or standardised predictions.
            labels: (B, T) in the labels' unit, NaN if missing.

        Raises:
            ValueError: the shapes differ, or an output is not finite.
        """
        _check_shapes(outputs, labels)
        if not outputs.isfinite().all():
            raise ArgumentError("outputs are not finite, so they have no score; lower the learning rate")
        outputs = outputs.detach().to(self.device, torch.float64)
        self.outputs.append(outputs * self.std.to(outputs) + self.mean.to(outputs))
        self.labels.append(labels.to(outputs))

    def by_task(self) -> list[Tensor | None]:
        """Return the metric of each task, None where it is undefined."""
        measure = _MEASURES[self.name]
        scores: list[Tensor | None] = []
        for outputs, labels in zip(dim_zero_cat(self.outputs).T, dim_zero_cat(self.labels).T, strict=True):
            present = ~labels.isnan()
            defined = len(labels[present].unique()) >= measure.distinct
            scores.append(measure.function(outputs[present], labels[present]) if defined else None)
        return scores

    def compute(self) -> Tensor:
        """Return the mean over the tasks for which the metric is defined."""
        scores = [score for score in self.by_task() if score is not None]
        if not scores:
            distinct = _MEASURES[self.name].distinct
            raise DataError(f"{self.name} is undefined for every task: each needs {distinct} distinct labels")
        return torch.stack(scores).mean()


class MoleculeTask(Task):
    """Predict one or several properties of molecules; labels may be missing.

    Regression labels are standardised, task by task, by the mean and the (population) standard deviation of the
    training split; the head predicts standardised values, and metrics are in the labels' unit.

    Args:
        splits: labelled molecules of "train", "valid" and "test"; each graph has `y` (1, T), NaN if missing.
        label_names: the T tasks.
        kind: "classification" (labels 0 and 1, one logit a task) or "regression"; by default classification if all
            labels are 0 or 1.
        metric: "roc_auc" for classification; "rmse" (the default) or "mae" for regression. The mean over tasks.
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
        metric: str | None = None,
        dropout: float = 0.0,
        class_weights: ClassWeights = "none",
        remarks: Sequence[str] = (),
    ) -> None:
        super().__init__(splits)
        if set(splits) != {"train", "valid", "test"}:
            raise DataError(f"splits={sorted(splits)}: give 'train', 'valid' and 'test'")
        self.label_names, self.dropout = tuple(label_names), dropout
        labels = {split: _labels(split, examples, self.label_names) for split, examples in splits.items()}
        self.kind = kind or _infer_kind(labels.values())
        metrics = [name for name, measure in _MEASURES.items() if measure.kind == self.kind]
        if not metrics:
            raise DataError(f"kind={kind!r}: give 'classification' or 'regression'")
        self.metric_name = metrics[0] if metric is None else metric
        if self.metric_name not in metrics:
            raise DataError(f"metric={metric!r} does not fit {self.kind}; give {' or '.join(map(repr, metrics))}")
        self.greater_is_better = _MEASURES[self.metric_name].greater_is_better
        if self.kind == "classification":
            for split, examples in splits.items():
                _check_classes(split, examples, labels[split], self.label_names)
        self.remarks = (*remarks, *self._coverage(labels))
        self.mean, self.std = self._standardisation(labels["train"])
        self.class_weights = None
        if check_class_weights(class_weights, self.kind) == "balanced":
            counts = torch.stack([(labels["train"] == k).sum(0) for k in (0, 1)])
            self.class_weights = balanced_weights(counts)

    @classmethod
    def from_molecules(
        cls,
        molecules: Molecules,
        *,
        kind: Kind | None = None,
        split: Literal["scaffold", "random"] = "scaffold",
        chirality: bool = True,
        seed: int = 0,
        metric: str | None = None,
        dropout: float = 0.0,
        class_weights: ClassWeights = "none",
    ) -> MoleculeTask:
        """Split labelled molecules 8:1:1 into a task.

        Args:
            molecules: labelled molecules, from `read_table` or `molecule_net`.
            split: by Bemis-Murcko scaffold, or at random.
            chirality: distinguish scaffolds that differ in stereochemistry.
            seed: the seed of the random split.
            kind, metric, dropout, class_weights: as in the constructor.

        Returns:
            The task.

        Raises:
            DataError: a split is empty, or as in the constructor.
        """
        if split == "scaffold":
            indices = scaffold_split(molecules.smiles, chirality=chirality)
        elif split == "random":
            indices = random_split(len(molecules), seed=seed)
        else:
            raise DataError(f"split={split!r}: give 'scaffold' or 'random'")
        return cls(
            {name: molecules.subset(chosen) for name, chosen in indices.items()},
            label_names=molecules.label_names,
            kind=kind,
            metric=metric,
            dropout=dropout,
            class_weights=class_weights,
            remarks=[molecules.summary()] if molecules.skipped else [],
        )

    @classmethod
    def from_csv(
        cls,
        train: str | os.PathLike[str],
        *,
        valid: str | os.PathLike[str] | None = None,
        test: str | os.PathLike[str] | None = None,
        labels: Sequence[str] | None = None,
        kind: Kind | None = None,
        split: Literal["scaffold", "random"] = "scaffold",
        chirality: bool = True,
        seed: int = 0,
        strict: bool = False,
        metric: str | None = None,
        dropout: float = 0.0,
        class_weights: ClassWeights = "none",
    ) -> MoleculeTask:
        """Read a task from one file, which is split 8:1:1, or from three.

        Args:
            train: `.csv` or `.csv.gz` with a column `smiles` and label columns.
            valid, test: as `train`; both or neither.
            labels: the label columns; by default all but `smiles`, of the training file.
            split, chirality, seed: as in `from_molecules`; for one file only.
            strict: refuse a SMILES that RDKit cannot parse, instead of leaving it out and reporting it in `remarks`.
            kind, metric, dropout, class_weights: as in the constructor.

        Returns:
            The task.

        Raises:
            DataError: as in `read_table`, `from_molecules` and the constructor.
        """
        molecules = read_table(train, labels=labels, strict=strict)
        if valid is None and test is None:
            return cls.from_molecules(
                molecules,
                kind=kind,
                split=split,
                chirality=chirality,
                seed=seed,
                metric=metric,
                dropout=dropout,
                class_weights=class_weights,
            )
        if valid is None or test is None:
            present, missing = ("test", "valid") if valid is None else ("valid", "test")
            raise DataError(
                f"{present} is given without {missing}; give both, or neither to split the training file 8:1:1"
            )
        files = [molecules, *(read_table(path, labels=molecules.label_names, strict=strict) for path in (valid, test))]
        return cls(
            {"train": files[0], "valid": files[1], "test": files[2]},
            label_names=molecules.label_names,
            kind=kind,
            metric=metric,
            dropout=dropout,
            class_weights=class_weights,
            remarks=[table.summary() for table in files if table.skipped],
        )

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

    def columns(self, batch: Batch) -> Tensor:
        """Return standardised labels, or classes as 1 and 0, (B, T); NaN if missing."""
        labels = self.targets(batch)
        return (labels - self.mean.to(labels)) / self.std.to(labels)

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the mean loss over the labelled tasks of each molecule, 0 for a molecule without a label.

        Args:
            outputs: (B, T) logits, whose loss is the binary cross-entropy, or standardised predictions, whose loss is
                the squared error of standardised labels.
            batch: B molecules.

        Returns:
            (B,) losses, in float32 at least.

        Raises:
            ValueError: the outputs are not (B, T).
        """
        labels = self.targets(batch)
        _check_shapes(outputs, labels)
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        present = ~labels.isnan()
        # Missing labels are filled before any arithmetic: the gradient of a masked NaN would still be NaN.
        labels = (torch.where(present, labels, 0).to(outputs) - self.mean.to(outputs)) / self.std.to(outputs)
        loss = binary_cross_entropy_with_logits if self.kind == "classification" else mse_loss
        losses = torch.where(present, loss(outputs, labels, reduction="none"), 0)
        if self.class_weights is not None:
            negative, positive = self.class_weights.to(losses)
            losses = losses * torch.where(labels > 0.5, positive, negative)
        return losses.sum(dim=1) / present.sum(dim=1).clamp(min=1)

    def metric(self) -> TaskMean:
        """Return a fresh metric in the labels' unit, a mean over tasks."""
        return TaskMean(self.metric_name, self.mean, self.std)

    def predictor(self, members: Sequence[Member]) -> Predictor:
        """Return the predictor of finetuned models."""
        if self.kind == "classification":
            thresholds = (0.5,) * len(self.label_names)
            return Predictor(members, Target(form="binary", labels=self.label_names, thresholds=thresholds))
        mean, std = tuple(self.mean.tolist()), tuple(self.std.tolist())
        return Predictor(members, Target(form="numbers", labels=self.label_names, mean=mean, std=std))

    def measures(self, outputs: Tensor, targets: Tensor) -> dict[str, dict[str, float]]:
        """Return the metric of the outputs (N, T) for labels (N, T), label by label; none where it is undefined."""
        metric = self.metric()
        metric.update(outputs, targets)
        scores = zip(self.label_names, metric.by_task(), strict=True)
        return {name: {} if score is None else {self.metric_name: float(score)} for name, score in scores}

    def __repr__(self) -> str:
        sizes = ", ".join(f"{split} {len(examples)}" for split, examples in self.splits.items())
        return f"MoleculeTask({self.subject()}; {self.metric_name}; {sizes})"

    def subject(self) -> str:
        """Return the kind of the task and the names of the labels."""
        return f"{self.kind} of {', '.join(self.label_names)}"

    def _coverage(self, labels: Mapping[Split, Tensor]) -> list[str]:
        """Check that each split can be scored, and return a sentence on each task that is left out."""
        remarks = []
        for split, table in labels.items():
            distinct = [column[~column.isnan()].unique() for column in table.T]
            for name, values in zip(self.label_names, distinct, strict=True):
                if not len(values):
                    raise DataError(
                        f"task {name!r} has no label in the {split} split; leave it out by `labels`, or split otherwise"
                    )
                if len(values) < _MEASURES[self.metric_name].distinct:
                    remarks.append(
                        f"task {name!r} has only the label {values[0]:g} in the {split} split, "
                        f"and is left out of its {self.metric_name}"
                    )
            if all(len(values) < _MEASURES[self.metric_name].distinct for values in distinct):
                raise DataError(
                    f"no task has two classes in the {split} split, so its {self.metric_name} is undefined; "
                    "split otherwise, or give more molecules"
                )
        return remarks

    def _standardisation(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the standard deviation (T,) of training labels (N, T); 0 and 1 for classes."""
        if self.kind == "classification":
            return torch.zeros(labels.shape[1], dtype=torch.float64), torch.ones(labels.shape[1], dtype=torch.float64)
        mean = labels.double().nanmean(dim=0)
        std = (labels.double() - mean).square().nanmean(dim=0).sqrt()
        for name, column in zip(self.label_names, labels.T, strict=True):
            values = column[~column.isnan()].unique()
            if len(values) == 1:
                raise DataError(
                    f"task {name!r} has one label, {values[0]:g}, throughout the train split: nothing can be learnt; "
                    "leave it out by `labels`"
                )
        return mean, std


def _check_shapes(outputs: Tensor, labels: Tensor) -> None:
    """Check that outputs and labels have one shape: broadcasting would hide a difference."""
    if outputs.shape != labels.shape:
        raise ArgumentError(
            f"outputs have the shape {tuple(outputs.shape)} and labels {tuple(labels.shape)}; both must be (B, T)"
        )


def _labels(split: Split, examples: Sequence[Data], names: Sequence[str]) -> Tensor:
    """Return the labels (N, T) of a split, after checking that each example has T."""
    if not len(examples):
        raise DataError(f"the {split} split is empty; give at least one molecule")
    for index, graph in enumerate(examples):
        shape = None if graph.y is None else tuple(graph.y.shape)
        if shape != (1, len(names)):
            raise DataError(
                f"{_place(split, examples, index)}: y has the shape {shape}, not {(1, len(names))}: one a task"
            )
    return torch.cat([graph.y for graph in examples])


def _check_classes(split: Split, examples: Sequence[Data], labels: Tensor, names: Sequence[str]) -> None:
    """Check that the labels (N, T) of a split are 0, 1 or missing."""
    wrong = (~labels.isnan() & (labels != 0) & (labels != 1)).nonzero().tolist()
    if wrong:
        index, task = wrong[0]
        raise DataError(
            f"{_place(split, examples, index)}: the label {labels[index, task]:g} of task {names[task]!r} is not 0 or "
            "1; correct it, leave it empty if it is missing, or use kind='regression'"
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
