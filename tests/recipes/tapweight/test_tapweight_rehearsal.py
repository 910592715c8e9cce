"""Rehearsals find the objective that suits a task, and random search the best of its candidates."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path

import attrs
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from tapweight_cases import F64, SETTINGS, Sum
from torch import Tensor, nn

from mlopt.errors import NonFiniteError
from mlopt.recipes import TapWeight
from mlopt.recipes.tapweight import encoder
from mlopt.recipes.tapweight.exact_head import labelled_features, ridge_leave_one_out
from mlopt.recipes.tapweight.methods import RandomSearch, Rehearsal, Single
from mlopt.recipes.tapweight.methods.rehearsing import rehearse
from mlopt.recipes.tapweight.objective import Objective
from mlopt.recipes.tapweight.significance import Signal
from mlopt.recipes.tapweight.task import Split
from mlopt.rng import derive_seed


class Narrow(encoder.Encoder):
    """One feature: it can hold what one objective needs."""

    width = 1

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1, dtype=F64)

    def forward(self, batch: Tensor) -> Tensor:
        return self.layer(batch)


class Direction(Objective):
    """Predict a linear function of the input."""

    def __init__(self, name: str, direction: Sequence[float]) -> None:
        self.name, self.direction = name, torch.tensor(direction, dtype=F64)

    def head(self, encoder: encoder.Encoder) -> nn.Module:
        return nn.Linear(1, 1, dtype=F64)

    def loss(self, encoder: encoder.Encoder, head: nn.Module, view: Tensor) -> Tensor:
        return (head(encoder(view)).squeeze(1) - view @ self.direction).square().mean()


def narrow(seed: int) -> TapWeight:
    """Return a recipe whose task, the sum of the inputs, is what the first objective predicts."""
    torch.manual_seed(seed)
    task = Sum({split: list(torch.randn(30, 3, dtype=F64)) for split in ("train", "valid", "test")})
    objectives = [
        Direction("sum", [1, 1, 1]),
        Direction("difference", [1, -1, 0]),
        Direction("contrast", [1, 1, -2]),
    ]
    settings = attrs.evolve(
        SETTINGS,
        batch_size=16,
        pretraining_lr=3e-2,
        rehearsal_steps=60,
        epochs=20,
        freeze_encoder=True,
        finetune_lr=0.1,
    )
    corpus = list(torch.randn(200, 3, dtype=F64))
    return TapWeight(Narrow(), objectives, task, corpus, settings=settings, seed=seed)


@pytest.mark.parametrize("seed", range(3))
def test_the_objective_that_suits_the_task_takes_the_weight_and_helps(seed: int) -> None:
    result = narrow(seed).fit(120, progress=False)
    assert result.weights["sum"] > 0.95
    assert result.signals["sum"].significant
    assert result.signals["sum"].mean > 0
    assert not any(signal.significant and signal.mean > 0 for name, signal in result.signals.items() if name != "sum")
    assert result.verdict.startswith(
        "By the labels of the task, sum helped significantly more than the average objective"
    )
    # The feature is the sum, to a factor: the errors left are those of the finetuned head.
    assert result.scores["rehearsal"]["test"] < 0.5 * result.scores["equal"]["test"]
    row = result.encoder.layer.weight[0].detach()
    assert float(row.std() / row.mean().abs()) < 0.15


def test_a_rehearsal_is_pretraining_on_one_objective_judged_by_held_out_examples() -> None:
    made = narrow(0)
    experiment = attrs.evolve(made.experiment(60, progress=False), settings=attrs.evolve(SETTINGS, rehearsals=1))
    candidates = {"sum": {"sum": 1.0, "difference": 0.0, "contrast": 0.0}}
    (losses,) = rehearse(experiment, candidates)
    model = experiment.model()
    alone = Single("sum")
    experiment.solve("alone", alone.problem(experiment, model), 60, seed=derive_seed(experiment.seed, "rehearsal", 0))
    expected = ridge_leave_one_out(*labelled_features(model.encoder, made.task, ("train", "valid"))).losses
    assert len(losses) == 60
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-12)


class Listed(Sum):
    """A task whose examples are listed twice each: those of the training split again in the validation split."""

    def keys(self, split: Split) -> Sequence[Hashable]:
        return [tuple(example.tolist()) for example in self.splits[split]]


def test_an_example_that_is_listed_twice_is_judged_once_by_a_head_that_did_not_see_it() -> None:
    experiment = narrow(0).experiment(60, progress=False)
    train = experiment.task.splits["train"]
    task = Listed({**experiment.task.splits, "valid": train[::-1]})
    settings = attrs.evolve(experiment.settings, rehearsals=1, rehearsal_steps=1)
    experiment = attrs.evolve(experiment, task=task, settings=settings)
    (losses,) = rehearse(experiment, {"sum": {"sum": 1.0, "difference": 0.0, "contrast": 0.0}})
    assert len(losses) == len(train)
    model = experiment.model()
    alone = Single("sum")
    experiment.solve("alone", alone.problem(experiment, model), 1, seed=derive_seed(experiment.seed, "rehearsal", 0))
    features, targets = labelled_features(model.encoder, task, ("train",))
    # With each row twice, the penalty n a is that of twice as many rows, and the fit is that of the rows once.
    torch.testing.assert_close(losses, ridge_leave_one_out(features, targets).losses, rtol=1e-9, atol=1e-12)


def test_random_search_takes_the_candidate_of_the_smallest_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def judged(experiment, candidates):
        seen.update(candidates)
        return torch.tensor([[3.0, 3.0], [1.0, 1.5], [0.0, 9.0]])

    monkeypatch.setattr("mlopt.recipes.tapweight.methods.random_search.rehearse", judged)
    weights = RandomSearch().adapt(narrow(0).experiment(3, progress=False)).weights
    assert list(seen) == ["random-0", "random-1", "random-2"]
    assert weights == seen["random-1"]
    assert all(sum(candidate.values()) == pytest.approx(1) for candidate in seen.values())
    again = RandomSearch().adapt(narrow(0).experiment(3, progress=False)).weights
    assert again == weights


def test_more_rehearsals_are_averaged() -> None:
    experiment = narrow(1).experiment(20, progress=False)
    candidates = {"difference": {"sum": 0.0, "difference": 1.0, "contrast": 0.0}}
    once, twice = (
        rehearse(attrs.evolve(experiment, settings=attrs.evolve(experiment.settings, rehearsals=count)), candidates)
        for count in (1, 2)
    )
    assert not torch.equal(once, twice)
    assert Rehearsal().passes(
        attrs.evolve(experiment, settings=attrs.evolve(experiment.settings, rehearsals=2))
    ) > Rehearsal().passes(attrs.evolve(experiment, settings=attrs.evolve(experiment.settings, rehearsals=1)))


class Broken(Narrow):
    """A network whose features are not finite in eval mode."""

    value = float("nan")

    def forward(self, batch: Tensor) -> Tensor:
        return super().forward(batch) * (1 if self.training else self.value)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_features_that_are_not_finite_are_an_error_that_names_the_objective(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Broken, "value", float(value))
    made = narrow(0)
    experiment = attrs.evolve(made.experiment(2, progress=False), encoder=Broken(), start=None)
    with pytest.raises(NonFiniteError, match=r"rehearsal of 'sum': the encoder's features .* lower pretraining_lr"):
        Rehearsal().adapt(experiment)


def test_labels_that_are_not_finite_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sum, "columns", lambda self, batch: batch.sum(1, keepdim=True) * torch.inf)
    with pytest.raises(NonFiniteError, match=r"rehearsal of 'sum': the losses .* give finite labels"):
        Rehearsal().adapt(narrow(0).experiment(2, progress=False))


def test_a_rehearsal_that_diverges_names_the_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = narrow(0).experiment(2, progress=False)
    experiment.prepare()
    monkeypatch.setattr(experiment.objectives[1], "direction", torch.full((3,), torch.nan, dtype=F64))
    with pytest.raises(NonFiniteError, match=r"rehearsal of 'difference': outer step 1: .* lower pretraining_lr"):
        Rehearsal().adapt(experiment)


def test_the_steps_for_each_step_on_the_weights_do_not_change_a_rehearsal() -> None:
    """A rehearsal of four steps at every=10 has four steps, not none."""
    candidates = {"sum": {"sum": 1.0, "difference": 0.0, "contrast": 0.0}}
    experiment = narrow(0).experiment(20, progress=False)
    losses = [
        rehearse(attrs.evolve(experiment, settings=attrs.evolve(SETTINGS, rehearsal_steps=4, every=every)), candidates)
        for every in (1, 10)
    ]
    assert torch.equal(*losses)


def test_objectives_that_do_not_differ_share_the_weight() -> None:
    made = narrow(0)
    same = [Direction(name, [1, 1, 1]) for name in ("a", "b", "c")]
    settings = attrs.evolve(SETTINGS, pretraining_lr=0.0, rehearsal_steps=2)
    weights = TapWeight(Narrow(), same, made.task, list(torch.randn(40, 3, dtype=F64)), settings=settings).fit(
        2, methods=["rehearsal"], progress=False
    )
    assert weights.weights == pytest.approx(dict.fromkeys("abc", 1 / 3))


def test_the_picture_shows_each_weight_with_its_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    signals = {
        name: Signal(mean=0.1, error=0.1, z=1.0, significant=False, weight_error=error)
        for name, error in (("sum", 0.25), ("difference", 0.125), ("contrast", 0.0))
    }
    result = narrow(0).fit(4, progress=False)
    weights = {"sum": 0.875, "difference": 0.0625, "contrast": 0.0625}
    main = attrs.evolve(result.main, weights=weights)
    attrs.evolve(result, signals=signals, outcomes={"rehearsal": main}).plot(tmp_path / "weights.png")
    axes = drawn[0].axes[0]
    (bars,) = [group for group in axes.containers if isinstance(group, BarContainer)]
    assert [bar.get_width() for bar in bars] == [0.875, 0.0625, 0.0625]
    (errors,) = bars.errorbar.lines[2]
    # A share ends at 0 and at 1.
    assert [segment[:, 0].tolist() for segment in errors.get_segments()] == [
        [0.625, 1.0],
        [0.0, 0.1875],
        [0.0625, 0.0625],
    ]


def test_no_text_leaves_the_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    result = narrow(0).fit(4, progress=False)
    # The longest name among the objectives has 20 letters.
    names = {name: f"{name:_<20}" for name in result.weights}
    main = attrs.evolve(result.main, weights={names[name]: weight for name, weight in result.weights.items()})
    signals = {names[name]: signal for name, signal in result.signals.items()}
    attrs.evolve(result, signals=signals, outcomes={"rehearsal": main}).plot(tmp_path / "weights.png")
    (figure,) = drawn
    FigureCanvasAgg(figure).draw()
    texts = [text for axes in figure.axes for text in (axes.title, axes.xaxis.label, *axes.get_yticklabels())]
    assert len(texts) == 2 * (2 + len(names))
    for text in texts:
        extent = text.get_window_extent()
        assert figure.bbox.x0 <= extent.x0 <= extent.x1 <= figure.bbox.x1, text.get_text()
