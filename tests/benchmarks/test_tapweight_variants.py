"""Variants of the methods do what they say: models of mixtures, rounds of halving, starts and sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from study_cases import plan

from benchmarks.tapweight.study import modality_of
from benchmarks.tapweight.variants import arms, method_of, rehearsals
from benchmarks.tapweight.variants.arms import best_mixture
from benchmarks.tapweight.variants.rehearsals import FromRehearsal
from mlopt.errors import ArgumentError
from mlopt.recipes.tapweight.experiment import Experiment
from mlopt.recipes.tapweight.methods import Rehearsal


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    own = plan(tmp_path, objectives=("masked_atoms", "size", "functional_groups", "random_labels"))
    modality = modality_of(own)
    prepared = modality.recipe("corpus", modality.task("esol", 0, 20), 0).experiment(8, progress=False)
    return attrs.evolve(prepared, budget=120, settings=attrs.evolve(prepared.settings, rehearsal_steps=4))


def test_the_best_mixture_of_a_loss_that_is_linear_in_the_roots() -> None:
    torch.manual_seed(0)
    slopes = torch.tensor([-3.0, -4.0, 2.0], dtype=torch.float64)
    points = torch.cat([torch.eye(3, dtype=torch.float64), torch.rand(30, 3, dtype=torch.float64)])
    points = points / points.sum(1, keepdim=True)
    losses = 7 + points.sqrt() @ slopes
    # The minimum of -3 sqrt(a) - 4 sqrt(1 - a) is at a = 9 / 25.
    expected = torch.tensor([9 / 25, 16 / 25, 0.0], dtype=torch.float64)
    torch.testing.assert_close(best_mixture(points, losses.repeat(5, 1)), expected, rtol=0, atol=5e-3)
    harmful = 7 + points.sqrt() @ torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(best_mixture(points, harmful[None])[1], torch.tensor(1.0, dtype=torch.float64))


def test_halving_leaves_out_the_objectives_of_the_larger_losses(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[tuple[list[str], int, int]] = []
    losses = {"masked_atoms": 3.0, "size": 1.0, "functional_groups": 2.0, "random_labels": 4.0}

    def judged(own: Experiment, candidates: dict[str, Any]) -> torch.Tensor:
        rounds.append(([*candidates], own.settings.rehearsal_steps, own.settings.rehearsals))
        return torch.stack([torch.full((20,), losses[name.partition("-")[2]]) for name in candidates])

    monkeypatch.setattr(arms, "rehearse", judged)
    adapted = method_of("rehearsal-halving").adapt(experiment)
    assert rounds == [
        (["2-masked_atoms", "2-size", "2-functional_groups", "2-random_labels"], 2, 1),
        (["4-size", "4-functional_groups"], 4, 1),
        (["8-size"], 8, 2),
    ]
    assert adapted.weights == {"masked_atoms": 0.0, "size": 1.0, "functional_groups": 0.0, "random_labels": 0.0}
    # 4 x 2 + 2 x 4 + 2 x 8 steps of one pass, and features of two splits for each of 8 arms; the rest is the main run.
    assert adapted.steps == 120 - (8 + 8 + 16) - 2 * 8


def weighed(monkeypatch: pytest.MonkeyPatch, weights: list[float], significant: bool) -> None:
    """Let rehearsals find these weights."""
    names = ("masked_atoms", "size", "functional_groups", "random_labels")

    def found(experiment: Experiment) -> tuple[dict[str, float], dict[str, Any]]:
        signal = attrs.make_class("Signal", ["significant"])(significant)
        return dict(zip(names, weights, strict=True)), dict.fromkeys(names, signal)

    monkeypatch.setattr(Rehearsal, "weigh", staticmethod(found))


@pytest.mark.parametrize("significant", [False, True])
def test_weights_without_a_verdict_are_equal(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, significant: bool
) -> None:
    weighed(monkeypatch, [0.7, 0.1, 0.1, 0.1], significant)
    adapted = method_of("rehearsal-verdict").adapt(experiment)
    assert adapted.weights is not None
    assert [*adapted.weights.values()] == ([0.7, 0.1, 0.1, 0.1] if significant else [0.25] * 4)


def test_a_weighted_sum_pays_for_each_loss(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    weighed(monkeypatch, [0.5, 0.495, 0.005, 0.0], True)
    adapted = method_of("rehearsal-sum").adapt(experiment)
    # Two losses of one view each at every step; the third is left out.
    assert adapted.steps == (120 - Rehearsal.rehearsals(experiment)) // 2
    assert adapted.weights == pytest.approx(
        {"masked_atoms": 100 / 199, "size": 99 / 199, "functional_groups": 0.0, "random_labels": 0.0}
    )


def test_the_published_form_starts_at_the_weights_of_the_rehearsals(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    weighed(monkeypatch, [0.6, 0.2, 0.2, 0.0], True)
    still = attrs.evolve(experiment, settings=attrs.evolve(experiment.settings, weights_lr=0.0))
    weights = FromRehearsal().adapt(still).weights
    assert weights is not None
    assert [*weights.values()] == pytest.approx([0.6 / 1.01, 0.2 / 1.01, 0.2 / 1.01, 0.01 / 1.01], rel=1e-5)


def test_the_second_round_starts_from_the_adapted_encoder(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = []

    def judged(own: Experiment, candidates: dict[str, Any]) -> torch.Tensor:
        starts.append((own.model().encoder.state_dict(), own.seed, own.settings.rehearsals))
        return torch.arange(4.0)[:, None].expand(4, 20)

    monkeypatch.setattr(rehearsals, "rehearse", judged)
    adapted = method_of("rehearsal-sequential").adapt(experiment)
    (first, first_seed, once), (second, second_seed, again) = starts
    assert (once, again) == (1, 1)
    assert first_seed != second_seed
    moved = [name for name, value in first.items() if not torch.equal(value, second[name])]
    assert moved
    assert any(not torch.equal(second[name], value) for name, value in adapted.encoder.state_dict().items())
    assert adapted.steps == 120 - Rehearsal.rehearsals(experiment)


def test_a_setting_that_does_not_act_is_refused() -> None:
    with pytest.raises(ArgumentError, match="no setting 'epochs'"):
        method_of("equal:epochs=3")
