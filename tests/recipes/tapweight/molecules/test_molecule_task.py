"""The losses, metrics and checks of a molecular task, compared with closed forms and scikit-learn."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_absolute_error, roc_auc_score, root_mean_squared_error
from torch import Tensor, nn
from torch_geometric.nn import global_add_pool
from torch_geometric.utils import from_smiles

from mlopt.recipes.tapweight.files import DataError
from mlopt.recipes.tapweight.molecules.data import read_corpus, read_table
from mlopt.recipes.tapweight.molecules.task import MoleculeTask

if TYPE_CHECKING:
    from pathlib import Path

    from torch_geometric.data import Batch, Data

NAN = math.nan


def graphs(labels: Tensor | list[list[float]]) -> list[Data]:
    """Return carbon chains with the given labels (N, T)."""
    examples = []
    for length, row in enumerate(torch.as_tensor(labels, dtype=torch.float32), start=1):
        graph = from_smiles("C" * length)
        graph.y = row.view(1, -1)
        examples.append(graph)
    return examples


def task_of(train: Any, valid: Any = None, test: Any = None, **options: Any) -> MoleculeTask:
    tables = {"train": train, "valid": train if valid is None else valid, "test": train if test is None else test}
    names = [f"t{index}" for index in range(len(train[0]))]
    return MoleculeTask({split: graphs(table) for split, table in tables.items()}, label_names=names, **options)


def batch_of(labels: Tensor | list[list[float]]) -> Any:
    return SimpleNamespace(y=torch.as_tensor(labels, dtype=torch.float32))


class Encoder(nn.Module):
    width = 9

    def pool(self, batch: Batch) -> Tensor:
        return global_add_pool(batch.x.float(), batch.batch)


CLASSES = [[0.0, 1.0], [1.0, NAN], [NAN, 0.0], [NAN, NAN]]
VALUES = [[10.0, 1.0], [20.0, NAN], [30.0, 5.0], [NAN, NAN]]


def test_graphs_that_were_not_read_from_a_file_are_all_different() -> None:
    made = task_of(VALUES)
    assert len({key for split in made.splits for key in made.keys(split)}) == 3 * len(VALUES)


def test_classification_loss_is_the_mean_over_labelled_tasks() -> None:
    outputs = torch.tensor([[2.0, 1.0], [-1.0, 50.0], [9.0, 3.0], [4.0, 4.0]], dtype=torch.float64, requires_grad=True)
    losses = task_of(CLASSES).losses(outputs, batch_of(CLASSES))
    expected = [
        (math.log1p(math.exp(2)) + math.log1p(math.exp(-1))) / 2,
        math.log1p(math.e),
        math.log1p(math.exp(3)),
        0,
    ]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(losses.sum(), outputs, create_graph=True)
    (curvature,) = torch.autograd.grad(gradient.sum(), outputs)
    missing = torch.tensor(CLASSES).isnan()
    for derivative in (gradient, curvature):
        assert derivative.isfinite().all()
        assert torch.equal(derivative == 0, missing)


def test_regression_loss_is_in_standard_units_of_the_training_split() -> None:
    task = task_of(VALUES, valid=[[1e3, 1e3]], test=[[-1e3, 0.0]], kind="regression")
    torch.testing.assert_close(task.mean, torch.tensor([20.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(task.std, torch.tensor([math.sqrt(200 / 3), 2.0], dtype=torch.float64))
    outputs = torch.zeros(4, 2, requires_grad=True)
    losses = task.losses(outputs, batch_of(VALUES))
    torch.testing.assert_close(losses, torch.tensor([(1.5 + 1) / 2, 0.0, (1.5 + 1) / 2, 0.0]))
    (gradient,) = torch.autograd.grad(losses.sum(), outputs)
    assert gradient.isfinite().all()


def test_losses_are_float32_at_least() -> None:
    task = task_of(CLASSES)
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert task.losses(torch.zeros(4, 2, dtype=dtype), batch_of(CLASSES)).dtype == expected


@pytest.mark.parametrize("shape", [(4,), (4, 1), (1, 2), (2, 4)])
def test_outputs_are_never_broadcast(shape: tuple[int, ...]) -> None:
    task = task_of(CLASSES)
    with pytest.raises(ValueError, match="both must be"):
        task.losses(torch.zeros(shape), batch_of(CLASSES))
    with pytest.raises(ValueError, match="both must be"):
        task.metric().update(torch.zeros(shape), torch.tensor(CLASSES))


def random_tables(seed: int, kind: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randn(60, 3, generator=generator) * 7 + 100
    labels = (labels > 100).float() if kind == "classification" else labels
    labels[torch.rand(60, 3, generator=generator) < 0.3] = NAN
    outputs = torch.randn(60, 3, generator=generator).round(decimals=1) * 40  # with ties, and beyond a sigmoid's range
    return outputs, labels


@pytest.mark.parametrize("seed", range(5))
def test_roc_auc_equals_scikit_learn(seed: int) -> None:
    outputs, labels = random_tables(seed, "classification")
    task = task_of(labels)
    assert (task.kind, task.metric_name, task.greater_is_better) == ("classification", "roc_auc", True)
    metric = task.metric()
    for rows in (slice(0, 7), slice(7, 8), slice(8, 60)):
        metric.update(outputs[rows], labels[rows])
    present = [~labels[:, index].isnan() for index in range(3)]
    each = [roc_auc_score(labels[p, index], outputs[p, index]) for index, p in enumerate(present)]
    assert float(metric.compute()) == pytest.approx(np.mean(each), abs=1e-6)


def test_roc_auc_does_not_depend_on_the_batches_or_on_the_scale_of_logits() -> None:
    outputs, labels = torch.tensor([[0.2], [0.9], [30.0], [31.0], [500.0], [-500.0]]), [[0.0], [1], [0], [1], [1], [0]]
    table = torch.tensor(labels)
    expected = roc_auc_score(table, outputs)
    metric = task_of(table).metric()
    for start in range(0, 6, 2):
        metric.update(outputs[start : start + 2], table[start : start + 2])
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-7)
    assert expected == pytest.approx(8 / 9)


@pytest.mark.parametrize(("name", "reference"), [("rmse", root_mean_squared_error), ("mae", mean_absolute_error)])
def test_regression_metrics_are_in_the_unit_of_the_labels(name: str, reference: Any) -> None:
    outputs, labels = random_tables(0, "regression")
    task = task_of(labels, metric=name)
    assert (task.kind, task.metric_name, task.greater_is_better) == ("regression", name, False)
    metric = task.metric()
    metric.update(outputs[:20], labels[:20])
    metric.update(outputs[20:], labels[20:])
    values, each = labels.double().numpy(), []
    for index in range(3):
        known = ~np.isnan(values[:, index])
        truth = values[known, index]
        each.append(reference(truth, outputs[known, index].double().numpy() * truth.std() + truth.mean()))
    assert float(metric.compute()) == pytest.approx(np.mean(each), rel=1e-6)


def test_a_metric_replays_after_reset_and_returns_the_value_of_a_batch() -> None:
    metric = task_of([[0.0], [1.0]]).metric()
    labels = torch.tensor([[0.0], [1.0]])
    assert float(metric(torch.tensor([[1.0], [2.0]]), labels)) == 1
    assert float(metric(torch.tensor([[2.0], [1.0]]), labels)) == 0
    assert float(metric.compute()) == 0.5
    metric.reset()
    metric.update(torch.tensor([[0.0], [1.0]]), labels)
    assert float(metric.compute()) == 1


def test_outputs_that_are_not_finite_have_no_score() -> None:
    metric = task_of(CLASSES).metric()
    for value in (NAN, math.inf):
        with pytest.raises(ValueError, match="not finite"):
            metric.update(torch.full((4, 2), value), torch.tensor(CLASSES))


def test_a_task_of_one_class_is_left_out_and_reported() -> None:
    valid = [[0.0, 1.0], [1.0, 1.0], [1.0, NAN]]
    task = task_of(CLASSES, valid=valid)
    assert task.remarks == ("task 't1' has only the label 1 in the valid split, and is left out of its roc_auc",)
    metric = task.metric()
    metric.update(torch.tensor([[3.0, 0.0], [1.0, 0.0], [4.0, 0.0]]), torch.tensor(valid))
    assert float(metric.compute()) == 0.5
    metric.reset()
    metric.update(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="undefined for every task"):
        metric.compute()


def test_construction_errors() -> None:
    with pytest.raises(
        DataError, match="task 't1' has no label in the test split; leave it out with --labels, or give --split"
    ):
        task_of(CLASSES, test=[[0.0, NAN], [1.0, NAN]])
    with pytest.raises(DataError, match="no task has two classes in the valid split, so its roc_auc is undefined"):
        task_of(CLASSES, valid=[[0.0, 1.0]])
    with pytest.raises(DataError, match="example 1 of the valid split: the label 2 of task 't0' is not 0 or 1"):
        task_of([[0.0], [1.0]], valid=[[0.0], [2.0]], kind="classification")
    with pytest.raises(DataError, match=r"task 't0' has one label, 0\.1, throughout the train split"):
        task_of([[0.1]] * 3, valid=[[0.2]], test=[[0.3]])
    with pytest.raises(DataError, match=r"example 0 of the test split: y has the shape \(1, 1\); it must be \(1, 2\)"):
        task_of(CLASSES, test=[[0.0], [1.0]])
    with pytest.raises(DataError, match="metric='rmse' does not fit classification; give 'roc_auc' or 'pr_auc' or"):
        task_of(CLASSES, metric="rmse")
    with pytest.raises(DataError, match="metric='auc' does not fit regression; give 'rmse' or 'mae'"):
        task_of(VALUES, metric="auc")
    with pytest.raises(DataError, match="kind='ranking': give regression or classification with --kind"):
        task_of(CLASSES, kind="ranking")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="the test split is empty"):
        task_of(CLASSES, test=[])
    with pytest.raises(DataError, match=r"splits=\['train'\]: give 'train', 'valid' and 'test'"):
        MoleculeTask({"train": graphs(CLASSES)}, label_names=["a", "b"])


def test_unlabelled_molecules_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.smi").write_text("".join(f"{'C' * k}\n" for k in range(1, 11)))
    with pytest.raises(DataError, match=r"a\.smi: there are no labels, but a task needs them"):
        MoleculeTask.from_molecules(read_corpus(tmp_path / "a.smi"), split="random")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Return the paths of three small files; the training file has a row that is not a molecule."""
    rows = {
        "train": ["C1CC,0,1.5", "CC,1,2.5", "CCC,0,3.5"],
        "valid": ["CCCC,0,1", "CCCCC,1,2"],
        "test": ["CN,0,1", "CO,1,2"],
    }
    for split, lines in rows.items():
        (tmp_path / f"{split}.csv").write_text("\n".join(["smiles,active,logS", *lines, ""]))
    return {split: str(tmp_path / f"{split}.csv") for split in rows}


def test_from_three_files(files: dict[str, str]) -> None:
    train, valid, test = files.values()
    task = MoleculeTask.from_csv(train, valid=valid, test=test, labels=["active"])
    assert repr(task) == "MoleculeTask(classification of active; roc_auc; train 2, valid 2, test 2)"
    assert task.remarks == ("2 molecules of train.csv; 1 skipped: row 2 (not valid SMILES)",)
    assert [graph.smiles for graph in task.splits["test"]] == ["CN", "CO"]
    both = MoleculeTask.from_csv(train, valid=valid, test=test, metric="mae")
    assert (both.kind, both.metric_name, both.label_names) == ("regression", "mae", ("active", "logS"))
    with pytest.raises(DataError, match=r"train\.csv, row 2: 'C1CC' is not a molecule"):
        MoleculeTask.from_csv(train, valid=valid, test=test, strict=True)
    with pytest.raises(
        DataError, match=r"train\.csv, row 2, column 'logS': '1\.5' is a number, not the name of a class"
    ):
        MoleculeTask.from_csv(train, valid=valid, test=test, kind="classification")


def test_valid_and_test_are_given_together(files: dict[str, str]) -> None:
    with pytest.raises(DataError, match="valid is given without test; give both --valid and --test, or neither"):
        MoleculeTask.from_csv(files["train"], valid=files["valid"])
    with pytest.raises(DataError, match="test is given without valid; give both --valid and --test, or neither"):
        MoleculeTask.from_csv(files["train"], test=files["test"])
    with pytest.raises(DataError, match="split='shuffled': give 'scaffold', 'balanced', 'random', 'stratified'"):
        MoleculeTask.from_csv(files["train"], split="shuffled")  # type: ignore[arg-type]


def test_from_one_file(data_folder: Path) -> None:
    path = data_folder / "mol" / "freesolv.csv"
    task = MoleculeTask.from_csv(path)
    assert repr(task) == "MoleculeTask(regression of expt; rmse; train 513, valid 64, test 65)"
    molecules = read_table(path)
    first, second = (MoleculeTask.from_molecules(molecules, split="random", seed=seed) for seed in (0, 1))
    assert first.splits["test"].smiles != second.splits["test"].smiles
    labels = torch.cat([graph.y for graph in task.splits["train"]]).double()
    torch.testing.assert_close(task.mean, labels.mean(dim=0))
    torch.testing.assert_close(task.std, labels.std(dim=0, correction=0))


def test_score_of_a_head_on_an_encoder(data_folder: Path) -> None:
    task = MoleculeTask.from_csv(data_folder / "mol" / "freesolv.csv", dropout=0.5)
    encoder = Encoder()
    head = task.head(encoder)
    assert [type(module) for module in head] == [nn.Dropout, nn.Linear]
    assert head[0].p == 0.5
    batch = next(iter(task.loader("train", 5)))
    assert task.outputs(encoder, head, batch).shape == task.targets(batch).shape == (5, 1)
    nn.init.zeros_(head[1].weight), nn.init.zeros_(head[1].bias)
    assert task.score(encoder, head, "train") == pytest.approx(float(task.std), rel=1e-6)
    labels = torch.cat([graph.y for graph in task.splits["test"]]).double()
    expected = float((labels - task.mean).square().mean().sqrt())
    assert task.score(encoder, head, "test", batch_size=7) == pytest.approx(expected, rel=1e-6)


def test_training_with_missing_labels_lowers_the_loss() -> None:
    torch.manual_seed(0)
    task = task_of([*CLASSES, [1.0, 1.0], [1.0, 1.0]])
    encoder = Encoder()
    head = task.head(encoder)
    (batch,) = task.loader("train", 6)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    history = []
    for _ in range(30):
        loss = task.losses(task.outputs(encoder, head, batch), batch).mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        history.append(float(loss.detach()))
    assert all(parameter.isfinite().all() for parameter in head.parameters())
    assert history[-1] < 0.8 * history[0]
