"""The methods of a run: a new one is compared, costs are as stated, and the result holds the encoder of the last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest
import torch
from tapweight_cases import F64, SETTINGS, Encoder, Reconstruct, Sum, recipe
from torch import nn

import mlopt
from mlopt.recipes import TapWeight
from mlopt.recipes.tapweight.methods import (
    METHODS,
    Adapted,
    Direct,
    Equal,
    Given,
    Method,
    Rehearsal,
    Single,
    ThreeLevels,
    make_method,
)


class Halved(Method):
    name, title, summary = "halved", "half of the weights", "Pretrained to halve its weights."

    def passes(self, experiment):
        return 7

    def adapt(self, experiment, callbacks=()):
        model = experiment.model()
        with torch.no_grad():
            model.encoder.layer.weight.mul_(0.5)
        return Adapted(encoder=model.encoder)


def test_a_new_method_is_compared_with_the_others(tmp_path: Path) -> None:
    result = recipe().fit(8, methods=["direct", "equal", Halved()], progress=False)
    assert list(result.scores) == ["direct", "equal", "halved"]
    assert len({score["test"] for score in result.scores.values()}) == 3
    start = recipe().experiment(8).encoder.layer.weight
    torch.testing.assert_close(result.encoder.layer.weight, start / 2, rtol=1e-15, atol=0)
    (scores,) = result.tables()
    assert list(scores.columns[0].cells) == ["direct finetuning", "equal weights", "half of the weights"]
    assert list(scores.columns[3].cells) == ["0", "16", "7"]
    result.save(tmp_path)
    assert list(json.loads((tmp_path / "scores.json").read_text())["scores"]) == ["direct", "equal", "halved"]
    assert json.loads((tmp_path / "weights.json").read_text())["weights"] == {}
    card = (tmp_path / "encoder" / "README.md").read_text()
    assert "# Encoder adapted by half of the weights\n\nPretrained to halve its weights." in card
    assert f"| half of the weights | {result.scores['halved']['valid']:.3f} |" in card
    assert not (tmp_path / "weights.png").exists()
    with pytest.raises(ValueError, match="half of the weights did not measure"):
        result.plot(tmp_path / "weights.png")


def test_the_scores_are_those_of_the_finetuned_models_in_the_result() -> None:
    made = recipe(settings=attrs.evolve(SETTINGS, finetunings=2, epochs=6, finetune_lr=2.0))
    result = made.fit(8, progress=False)
    task = made.experiment(8).task
    again = {
        split: [task.score(run.model.encoder, run.model.head, split) for run in result.finetuned]
        for split in ("valid", "test")
    }
    assert min(run.score.epoch for run in result.finetuned) < 6  # the last epoch is not always the best
    assert [run.score.test for run in result.finetuned] == again["test"]
    assert result.scores["rehearsal"] == {split: sum(scores) / 2 for split, scores in again.items()}
    # Finetuning changed the encoder.
    assert not torch.equal(result.finetuned[0].model.encoder.layer.weight, result.encoder.layer.weight)


class Counting(Encoder):
    """An encoder that counts how often it is evaluated, its copies included."""

    calls: ClassVar[list[int]] = []

    def forward(self, batch):
        self.calls.append(len(batch))
        return super().forward(batch)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(
    "method",
    [
        *map(make_method, METHODS),
        Single("square"),
        Given({"linear": 3, "square": 1}),
        ThreeLevels(proximal="l1"),
    ],
    ids=lambda method: f"{method.name} {getattr(method, 'proximal', '')}",
)
def test_a_method_states_its_cost(method: Method, every: int) -> None:
    settings = attrs.evolve(SETTINGS, every=every, valid_batch_size=5, measurements=2)
    experiment = recipe(Counting, settings=settings).experiment(14, progress=False)
    Counting.calls.clear()
    method.adapt(experiment)
    assert len(Counting.calls) == method.passes(experiment)


def test_given_weights_are_those_of_the_loss() -> None:
    """One objective alone equals all weight on it; equal weights by name equal the given ones."""
    names = [
        "single:square",
        Given({"linear": 0, "square": 2}),
        "equal",
        Given({"square": 1, "linear": 1}, name="halves"),
    ]
    result = recipe().fit(6, methods=names, progress=False)
    assert list(result.scores) == ["single:square", "given", "equal", "halves"]
    assert result.scores["single:square"] == result.scores["given"]
    assert result.scores["equal"] == result.scores["halves"] != result.scores["given"]
    assert result.outcomes["given"].weights == {"linear": 0.0, "square": 1.0}
    assert result.weights == {"linear": 0.5, "square": 0.5}
    assert result.verdict == "This run did not measure how the objectives compare."
    assert result.outcomes["single:square"].title == "square alone"


def test_each_method_is_resumed_from_its_own_checkpoints(tmp_path: Path) -> None:
    methods = ["single:square", "equal", "tapweight"]
    whole = recipe().fit(6, methods=methods, checkpoint=tmp_path, progress=False)
    names = ("single-square", "equal", "tapweight")
    phases = [*names, *(f"finetuning-{name}-0" for name in names)]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == sorted(phases)
    again = recipe().fit(6, methods=methods, checkpoint=tmp_path, resume=True, progress=False)
    assert (again.scores, again.weights) == (whole.scores, whole.weights)


def seeded(seed: int = 8) -> Encoder:
    torch.manual_seed(seed)
    return Encoder()


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"steps": 8}, "the run has steps=6, not 8; resume with the same options, or give another folder"),
        ({"steps": None, "passes": 12}, "the run has passes=None, not 12; resume with the same options"),
        ({"settings": attrs.evolve(SETTINGS, scale="none")}, "the run has scale='gradient', not 'none'; resume"),
        ({"settings": attrs.evolve(SETTINGS, pretraining_lr=0.5)}, "the run has pretraining_lr=0.001, not 0.5; resume"),
        ({"seed": 4}, "the run has seed=0, not 4; resume"),
        ({"objectives": [Reconstruct("square", 2.0), Reconstruct("linear", 1.0)]}, "the run has objectives="),
        (
            {"encoder": lambda: seeded(9)},
            "variables of the encoder .* differ .*; build the same",
        ),
        ({"corpus": [torch.zeros(3, dtype=F64)] * 9}, "examples of the corpus differ .* or give another folder"),
    ],
)
def test_a_changed_run_is_not_resumed(changed: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    """A phase that ended is read: with other steps, the scores would be those of the encoder before the last ones."""
    options = {"methods": ["equal"], "checkpoint": tmp_path, "progress": False}
    recipe(seeded).fit(6, **options)
    budget = {name: changed[name] for name in ("steps", "passes") if name in changed} or {"steps": 6}
    arguments = {name: value for name, value in changed.items() if name not in budget}
    with pytest.raises(mlopt.CheckpointError, match=sentence) as error:
        recipe(**{"encoder": seeded, **arguments}).fit(**budget, resume=True, **options)
    assert str(error.value).startswith(str(tmp_path / "run.json"))
    more = recipe(seeded).fit(6, resume=True, **{**options, "methods": ["direct", "equal"]})
    assert list(more.scores) == ["direct", "equal"]


class Labelled(Sum):
    """Predict labels that are part of the examples."""

    def __init__(self, changed: int | None = None, metric: str = "mse") -> None:
        table = torch.randn(600, 3, dtype=F64, generator=torch.Generator().manual_seed(2))
        super().__init__({"train": list(table.clone()), "valid": list(table[:9]), "test": list(table[:9])})
        self.metric_name = metric
        if changed is not None:
            self.splits["train"][changed][2] = 9.0


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        (lambda: Labelled(changed=599), "the examples of the train split differ"),
        (lambda: Labelled(metric="error"), "the run has metric='mse', not 'error'"),
    ],
)
def test_a_run_on_a_changed_task_is_not_resumed(task: Any, sentence: str, tmp_path: Path) -> None:
    """The score of a phase that ended would be that of other labels."""
    corpus = list(torch.ones(9, 3, dtype=F64))
    objectives = [Reconstruct("linear", 1.0), Reconstruct("square", 2.0)]
    options = {"methods": ["direct"], "checkpoint": tmp_path, "progress": False}
    TapWeight(seeded(), objectives, Labelled(), corpus, settings=SETTINGS).fit(2, **options)
    with pytest.raises(mlopt.CheckpointError, match=sentence):
        TapWeight(seeded(), objectives, task(), corpus, settings=SETTINGS).fit(2, resume=True, **options)


def test_a_refused_start_does_not_change_the_description_of_the_run(tmp_path: Path) -> None:
    options = {"methods": ["equal"], "checkpoint": tmp_path, "progress": False}
    recipe().fit(6, **options)
    with pytest.raises(mlopt.CheckpointError, match="already holds checkpoints"):
        recipe().fit(8, **options)
    with pytest.raises(mlopt.CheckpointError, match="steps=6, not 8"):
        recipe().fit(8, resume=True, **options)


def test_a_damaged_description_of_the_run_is_named(tmp_path: Path) -> None:
    options = {"methods": ["equal"], "checkpoint": tmp_path, "progress": False}
    whole = recipe().fit(6, **options)
    (tmp_path / "run.json").write_text('{"options": ')
    with pytest.raises(mlopt.CheckpointError, match=r"run\.json: it is damaged .*delete it if the run is the same"):
        recipe().fit(6, resume=True, **options)
    (tmp_path / "run.json").unlink()
    assert recipe().fit(6, resume=True, **options).scores == whole.scores


@pytest.mark.parametrize(
    ("methods", "sentence"),
    [
        (
            ["equals"],
            "no method 'equals'; available: 'direct', 'equal', .* 'tapweight', .* 'single:OBJECTIVE' \\(did you mean 'equal'",
        ),
        (["single:"], "there is no method 'single:'"),
        ("direct", "fit: methods='direct'; it must be a sequence of names or Method objects"),
        (["direct", 3], r"fit: methods=\['direct', 3\]; it must be a sequence of names or Method objects"),
        (["single:cube"], "single:cube: 'cube' is not one of the objectives, linear, square"),
        ([Given({"linear": 1})], "given: weights of linear, but the objectives are linear, square"),
        ([], r"methods=\[\]; give at least one"),
        (["equal", Equal()], "give at least one, and none twice"),
    ],
)
def test_methods_that_cannot_be_compared_are_refused(methods: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        recipe().fit(8, methods=methods, progress=False)


@pytest.mark.parametrize("weights", [{"a": -1.0, "b": 2.0}, {"a": 0.0}, {"a": float("nan")}, {}])
def test_weights_that_are_not_shares_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="give finite numbers >= 0, at least one of them positive"):
        Given(weights)


def test_one_or_two_steps_are_a_run() -> None:
    assert recipe().fit(2, methods=["direct", "equal"], progress=False).scores.keys() == {"direct", "equal"}
    assert sum(recipe().fit(1, methods=["tapweight"], progress=False).weights.values()) == pytest.approx(1, abs=1e-6)


def test_methods_are_found_by_name() -> None:
    assert [type(make_method(name)) for name in ("direct", "rehearsal", "tapweight")] == [
        Direct,
        Rehearsal,
        ThreeLevels,
    ]
    assert [make_method(name).name for name in METHODS] == list(METHODS)
    assert make_method("single:a:b").objective == "a:b"


def test_a_module_that_is_not_an_encoder_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"encoder is a Linear; derive its class from mlopt\.recipes\.tapweight\.encoder"
    ):
        recipe(lambda: nn.Linear(3, 4))
