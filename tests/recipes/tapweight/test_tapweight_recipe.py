"""TapWeight end to end on a small encoder: refusals, results, and the comparison of methods on equal terms."""

from __future__ import annotations

import csv
import json
from functools import partial
from types import SimpleNamespace

import attrs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tapweight_cases import F64, SETTINGS, Encoder, Reconstruct, Sum, recipe
from torch import nn

import mlopt
from mlopt.recipes import TapWeight
from mlopt.recipes.tapweight.finetuning import Score, finetune
from mlopt.recipes.tapweight.methods.signals import SignalMeter
from mlopt.recipes.tapweight.settings import Settings

#: The published form is the main method.
GRADIENT = ("direct", "equal", "tapweight")


class Kept(Encoder):
    """An encoder that saves itself in its own way."""

    def save(self, folder):
        folder.mkdir()
        torch.save(self.state_dict(), folder / "state.pt")


class Constant(Reconstruct):
    """An objective whose loss ignores the encoder."""

    def loss(self, encoder, head, view):
        return head.weight.square().sum()


class Detached(Reconstruct):
    """An objective whose loss has no graph."""

    def loss(self, encoder, head, view):
        return super().loss(encoder, head, view).detach()


class Infinite(Reconstruct):
    """An objective whose loss is infinite."""

    def loss(self, encoder, head, view):
        return super().loss(encoder, head, view) * float("inf")


@pytest.mark.parametrize(
    ("objective", "sentence"),
    [
        (Constant("idle", 1.0), "the loss of objective 'idle' has no gradient on the encoder"),
        (Detached("idle", 1.0), "the loss of objective 'idle' has no gradient; do not detach it"),
        (Infinite("idle", 1.0), "the gradient of objective 'idle' is not finite"),
    ],
)
def test_an_objective_without_a_gradient_is_refused_at_the_start(objective, sentence):
    with pytest.raises(ValueError, match=sentence):
        recipe(objectives=[Reconstruct("linear", 1.0), objective]).fit(8, progress=False)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: recipe(objectives=[Reconstruct("linear", 1.0)]), "1 objectives"),
        (
            lambda: recipe(objectives=[Reconstruct("a", 1.0), Reconstruct("a", 2.0)]),
            "two of the objectives share a name",
        ),
        (lambda: recipe(corpus=[torch.ones(3, dtype=F64)]), "the corpus holds 1 examples; give at least two"),
        (lambda: recipe(settings=attrs.evolve(SETTINGS, every=4)).fit(3), "steps=3 at every=4: the weights never move"),
        (lambda: recipe().fit(progress=False), "steps=None and passes=None; give one of them"),
        (lambda: recipe().fit(3, passes=9, progress=False), "steps=3 and passes=9; give one of them"),
        (
            lambda: recipe().fit(passes=1, progress=False),
            "passes=1: the shortest run of equal takes 2; give at least that many",
        ),
        (lambda: Settings(gamma=0.0), "gamma=0.0; it must be a finite number > 0"),
        (lambda: Settings(every=0), "every=0; it must be a whole number >= 1"),
        (lambda: Settings(scale="norm"), "scale='norm'; it must be one of 'gradient', 'none'"),
    ],
)
def test_an_impossible_run_is_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_a_run_returns_and_saves_its_results(tmp_path):
    torch.manual_seed(2)
    start = Kept()
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    result = recipe(encoder=lambda: start).fit(8, methods=GRADIENT, progress=False)
    assert sum(result.weights.values()) == pytest.approx(1.0, abs=1e-6)
    assert all(weight > 0 for weight in result.weights.values())
    assert set(result.scores) == {"direct", "equal", "tapweight"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in start.state_dict().items())
    assert not torch.equal(result.encoder.layer.weight, before["layer.weight"])

    result.save(tmp_path)
    saved = json.loads((tmp_path / "weights.json").read_text())
    assert saved["weights"] == result.weights
    assert saved["verdict"] == result.verdict
    with open(tmp_path / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    assert not [name for name in rows[0] if "second" in name or "time" in name]
    # The first row holds the weights of the first step, equal ones.
    assert float(rows[0]["reweighting/weight/linear"]) == 0.5
    assert float(rows[-1]["reweighting/weight/linear"]) != 0.5
    state = torch.load(tmp_path / "encoder" / "state.pt", weights_only=True)
    assert torch.equal(state["layer.weight"], result.encoder.layer.weight)
    assert (tmp_path / "weights.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_repeats_a_run_and_another_does_not():
    methods = ["rehearsal", "tapweight"]
    first, second = (recipe().fit(6, methods=methods, progress=False) for _ in range(2))
    assert first.outcomes == second.outcomes
    other = recipe(seed=1).fit(6, methods=methods, progress=False)
    assert all(other.outcomes[name].weights != first.outcomes[name].weights for name in methods)


def test_a_run_depends_on_its_seed_and_on_nothing_drawn_before():
    first = recipe().fit(6, progress=False)
    again = recipe()
    again.prepare()
    torch.rand(3)
    assert [again.fit(6, progress=False).weights for _ in range(2)] == [first.weights] * 2


def test_a_measurement_takes_no_more_examples_at_once_than_a_step():
    rows = []

    class Noting(Encoder):
        def forward(self, batch):
            if not self.training and torch.is_grad_enabled():  # the validation examples, not those that are scored
                rows.append(len(batch))
            return super().forward(batch)

    made = recipe(encoder=Noting, settings=attrs.evolve(SETTINGS, valid_batch_size=5))
    made.fit(6, methods=["tapweight"], progress=False)
    # Steps on batches of 5; measurements on halves of 12, in parts of 5, 5 and 2.
    assert set(rows) == {5, 2}


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=st.lists(st.integers(0, 6), min_size=2, max_size=30).filter(lambda keys: len(set(keys)) > 1))
def test_the_rows_of_one_example_are_in_the_same_half(keys: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    halves: list[set[int]] = []

    def noted(problem, batches, *, seed):
        halves.append({key for piece in batches["reweighting"] for key in piece})
        return SimpleNamespace(gradient={"logits": torch.zeros(2)})

    monkeypatch.setattr(mlopt, "hypergradient", noted)
    meter = SignalMeter(["a", "b"], keys, keys, list, {}, start=0, interval=1, limit=8, batch_size=3, seed=len(keys))
    problem = {"reweighting": SimpleNamespace(module=lambda: torch.full((2,), 0.5))}
    for _ in range(3):
        meter._measure(problem)
    for first, second in zip(halves[::2], halves[1::2], strict=True):
        assert first
        assert second
        assert not first & second


def test_equal_weights_see_the_batches_that_tapweight_sees():
    """At a learning rate of zero for the weights, TapWeight is equal weights, to rounding."""
    settings = attrs.evolve(SETTINGS, weights_lr=0.0)
    result = recipe(settings=settings).fit(6, methods=GRADIENT, progress=False)
    equal, learned = result.scores["equal"], result.scores["tapweight"]
    assert equal["test"] == pytest.approx(learned["test"], rel=1e-6)
    assert result.weights == {"linear": 0.5, "square": 0.5}


def test_equal_weights_take_as_many_steps_as_recipe():
    """If `every` does not divide the steps, both take the whole multiples."""
    made = recipe(settings=attrs.evolve(SETTINGS, every=3, measurements=2, weights_lr=0.0))
    result = made.fit(14, methods=GRADIENT, progress=False)
    assert result.scores["equal"]["test"] == pytest.approx(result.scores["tapweight"]["test"], rel=1e-6)


def test_an_encoder_without_save_is_written_as_safetensors(tmp_path):
    result = recipe().fit(8, methods=["tapweight"], progress=False)
    result.save(tmp_path)
    state = load_file(tmp_path / "encoder" / "model.safetensors")
    assert torch.equal(state["layer.weight"], result.encoder.layer.weight)


def test_weights_move_at_every_nth_step_only():
    result = recipe(settings=attrs.evolve(SETTINGS, every=3, measurements=2)).fit(12, methods=GRADIENT, progress=False)
    assert len(result.history) == 4


def fixed_head(encoder):
    """Return a fixed head that all losses share: a step that helps one loss then helps the other."""
    head = nn.Linear(encoder.width, 1, dtype=F64).requires_grad_(False)
    torch.nn.init.constant_(head.weight, 1.0)
    torch.nn.init.zeros_(head.bias)
    return head


class FixedTask(Sum):
    """The sum of the inputs, predicted from the features by a fixed head."""

    def head(self, encoder):
        return fixed_head(encoder)


class Itself(Reconstruct):
    """The task itself, as an objective."""

    def head(self, encoder):
        return fixed_head(encoder)

    def view(self, batch):
        return batch

    def loss(self, encoder, head, view):
        return (head(encoder(view)).squeeze(1) - view.sum(1)).square().mean()


class Unpredictable(Itself):
    """An objective that cannot be predicted."""

    def loss(self, encoder, head, view):
        return (head(encoder(view)).squeeze(1) - 3 * (1e4 * view).sin().sum(1)).square().mean()


def test_a_useful_objective_gains_weight_and_is_significant():
    """One objective is the task itself and should win; the other cannot be learned."""
    settings = Settings(batch_size=32, task_batch_size=32, valid_batch_size=200, gamma=10.0, weights_lr=0.05, epochs=1)
    generator = torch.Generator().manual_seed(3)
    splits = {split: list(torch.randn(200, 3, dtype=F64, generator=generator)) for split in ("train", "valid", "test")}
    corpus = list(torch.randn(200, 3, dtype=F64, generator=generator))
    torch.manual_seed(0)
    objectives = [Itself("itself", 1.0), Unpredictable("unpredictable", 1.0)]
    result = TapWeight(Encoder(), objectives, FixedTask(splits), corpus, settings=settings).fit(
        100, methods=["tapweight"], progress=False
    )
    assert result.weights["itself"] > 0.7
    assert result.signals["itself"].significant
    assert result.signals["itself"].mean > 0
    assert "itself helped significantly" in result.verdict


def test_the_weights_wait_while_the_heads_warm_up():
    result = recipe(settings=attrs.evolve(SETTINGS, warmup=0.5)).fit(12, methods=GRADIENT, progress=False)
    path = result.history.column("reweighting/weight/linear")
    # A row holds the weights of its step: the first step that moves them is the seventh.
    assert path[:7] == [0.5] * 7
    assert 0.5 not in path[7:]


@pytest.mark.parametrize(("greater", "chosen"), [(False, 2), (True, 3)])
def test_the_epoch_is_chosen_on_validation_and_the_test_split_scored_once_at_it(greater, chosen):
    """Validation scores are scripted; the test split is scored with the state of the chosen epoch."""
    scores, states = [2.0, 1.0, 3.0], []

    class Scripted(Sum):
        greater_is_better = greater

        def score(self, encoder, head, split, batch_size=256):
            states.append((split, head.weight.detach().clone()))
            return scores[len(states) - 1] if split == "valid" else 7.0

    torch.manual_seed(0)
    splits = {split: list(torch.randn(16, 3, dtype=F64)) for split in ("train", "valid", "test")}
    settings = attrs.evolve(SETTINGS, epochs=3, finetune_lr=0.1)
    finetuned = finetune(Encoder(), Scripted(splits), settings, seed=0, solve=partial(mlopt.solve, progress=False))
    assert [split for split, _ in states] == ["valid"] * 3 + ["test"]
    assert finetuned.score == Score(valid=scores[chosen - 1], test=7.0, epoch=chosen)
    assert torch.equal(states[-1][1], states[chosen - 1][1])
    assert not torch.equal(states[0][1], states[1][1])


@pytest.mark.parametrize(("patience", "epochs", "chosen"), [(0, 6, 6), (1, 3, 2), (3, 5, 2), (4, 6, 6)])
def test_finetuning_stops_after_epochs_without_a_better_validation_score(patience, epochs, chosen, tmp_path):
    """The scores fall from epoch 3 on, and the last is the best; a resumed phase that stopped early does not go on."""
    scores, scored = [2.0, 1.0, 3.0, 4.0, 5.0, 0.0], []

    class Scripted(Sum):
        def score(self, encoder, head, split, batch_size=256):
            scored.append(split)
            return scores[scored.count("valid") - 1] if split == "valid" else 7.0

    torch.manual_seed(0)
    splits = {split: list(torch.randn(16, 3, dtype=F64)) for split in ("train", "valid", "test")}
    settings = attrs.evolve(SETTINGS, epochs=6, patience=patience)
    solve = partial(mlopt.solve, progress=False, checkpoint=mlopt.Checkpoints(tmp_path))
    finetuned = finetune(Encoder(), Scripted(splits), settings, seed=0, solve=solve)
    assert (scored.count("valid"), finetuned.score.epoch) == (epochs, chosen)
    again = finetune(Encoder(), Scripted(splits), settings, seed=0, solve=partial(solve, resume=True))
    assert scored.count("valid") == epochs
    assert again.score == finetuned.score
