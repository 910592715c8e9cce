"""Budgets in encoder passes: each method takes the most steps that it can afford, and the plan is printed first."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import attrs
import pytest
import torch
from tapweight_cases import SETTINGS, Encoder, Reconstruct, recipe

import mlopt
from mlopt.recipes.tapweight.methods import METHODS, Direct, Equal, Rehearsal, ThreeLevels, make_method
from mlopt.recipes.tapweight.methods.pretraining import drawn_passes, weighted_passes


class Counting(Encoder):
    """An encoder that counts how often it is evaluated, its copies included."""

    calls: ClassVar[list[int]] = []

    def forward(self, batch):
        self.calls.append(len(batch))
        return super().forward(batch)


class Twice(Reconstruct):
    """An objective of two views."""

    passes = 2

    def loss(self, encoder, head, view):
        return (super().loss(encoder, head, view) + super().loss(encoder, head, view)) / 2


def test_one_more_step_would_exceed_the_budget() -> None:
    experiment = recipe().experiment(1, progress=False)
    for name in (*METHODS, "single:square"):
        method = make_method(name)
        own = experiment.affordable(method, 200)
        assert method.passes(own) <= 200
        if name != "direct":
            assert method.passes(attrs.evolve(own, steps=own.steps + 1)) > 200, name
    assert experiment.affordable(Equal(), 200).steps == 100
    assert Direct().passes(experiment.affordable(Direct(), 200)) == 0


def test_a_step_costs_all_views_of_a_sum_and_those_of_one_objective_of_a_draw() -> None:
    objectives = [Reconstruct("linear", 1.0), Twice("square", 2.0)]
    experiment = recipe(objectives=objectives).experiment(1, progress=False)
    for square, drawn, weighted in ((0.0, 1.0, 1), (0.75, 1.75, 3), (1.0, 2.0, 2)):
        weights = {"linear": 1 - square, "square": square}
        assert drawn_passes(experiment, weights) == drawn
        assert weighted_passes(experiment, weights) == weighted


def test_a_budget_is_spent_and_not_exceeded() -> None:
    """The plan allows for the objective of most views; at the learned weights the main run takes as many more steps."""
    objectives = [Reconstruct("linear", 1.0), Twice("square", 2.0)]
    made = recipe(Counting, objectives=objectives, settings=attrs.evolve(SETTINGS, rehearsal_steps=5))
    experiment = made.experiment(1, progress=False).affordable(Rehearsal(), 120)
    Counting.calls.clear()
    adapted = Rehearsal().adapt(experiment)
    assert adapted.weights is not None
    # Two rehearsals of 5 steps of 1 and of 2 views, and two batches of features after each.
    rehearsals = 2 * 5 * 3 + 2 * 2 * 2
    views = adapted.weights["linear"] + 2 * adapted.weights["square"]
    steps = int((120 - rehearsals) / views)
    assert len(adapted.history) == steps
    spent = len(Counting.calls) - rehearsals
    # Each step draws one objective: the number of two views is binomial, here within four standard deviations.
    assert abs(spent - steps * views) <= 4 * (steps / 4) ** 0.5


def test_a_run_within_a_budget_states_what_each_method_takes(capsys: pytest.CaptureFixture[str]) -> None:
    result = recipe(settings=attrs.evolve(SETTINGS, rehearsal_steps=5)).fit(passes=120)
    assert {name: outcome.passes for name, outcome in result.outcomes.items()} == {
        "direct": 0,
        "equal": 120,
        "rehearsal": 120,
    }
    line = " ".join(capsys.readouterr().out.split())
    assert "Pretraining takes at most 240 encoder passes (direct 0, equal 120, rehearsal 120): about" in line
    # Three encoders are finetuned for two epochs of the 24 training examples in batches of 8; two scores of each of two splits.
    assert "on this machine. Finetuning takes at most" in line


def test_tasks_share_the_phases_that_do_not_depend_on_labels(tmp_path: Path) -> None:
    """The rehearsals are read; the main run, and pretraining at weights that were learned, are not."""
    made = recipe(Counting, settings=attrs.evolve(SETTINGS, rehearsal_steps=5))

    def experiment(task: str) -> object:
        own, shared = mlopt.Checkpoints(tmp_path / task), mlopt.Checkpoints(tmp_path / "shared")
        return attrs.evolve(made.experiment(6, progress=False), checkpoints=own, shared_checkpoints=shared, resume=True)

    first = Rehearsal().adapt(experiment("first"))
    phases = {path.name for path in (tmp_path / "shared").iterdir()}
    assert phases == {f"rehearsal-{repeat}-{name}" for repeat in (0, 1) for name in ("linear", "square")}
    assert {path.name for path in (tmp_path / "first").iterdir()} == {"rehearsal"}
    Counting.calls.clear()
    second = Rehearsal().adapt(experiment("second"))
    assert len(Counting.calls) == 6 + 8  # the main run, and features: two batches after each rehearsal
    assert second.weights == first.weights
    assert torch.equal(second.encoder.layer.weight, first.encoder.layer.weight)
    make_method("frozen").adapt(experiment("third"))
    assert {path.name for path in (tmp_path / "shared").iterdir()} == phases
    assert {path.name for path in (tmp_path / "third").iterdir()} == {"frozen", "frozen-learning"}


def test_a_method_without_steps_has_no_budget_to_exceed() -> None:
    with pytest.raises(ValueError, match="passes=0: the shortest run of tapweight takes"):
        recipe().experiment(1, progress=False).affordable(ThreeLevels(), 0)


@pytest.mark.parametrize("name", ["equal", "rehearsal", "tapweight"])
def test_a_budget_that_takes_no_step_on_the_weights_is_refused(name: str) -> None:
    experiment = recipe(settings=attrs.evolve(SETTINGS, every=5, rehearsal_steps=2)).experiment(5, progress=False)
    method = make_method(name)
    least = method.passes(experiment)
    assert experiment.affordable(method, least).pretraining_steps == 5
    with pytest.raises(ValueError, match=f"passes={least - 1}: the shortest run of {name} takes {least}"):
        experiment.affordable(method, least - 1)


@pytest.mark.parametrize("name", ["random_search", "rehearsal"])
def test_a_run_states_the_steps_and_passes_that_its_budget_pays(name: str) -> None:
    """A budget of 20 pays rehearsals of 2 steps, 16 passes with their features, and 4 steps of the main run; 3 are too long."""
    result = recipe(settings=attrs.evolve(SETTINGS, rehearsal_steps=10)).fit(passes=20, methods=[name], progress=False)
    assert result.steps == len(result.history) == 4
    assert result.main.passes == 20
