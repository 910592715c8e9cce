"""An ablation compares variants with their method on development and fresh seeds apart, and runs row by row."""

from __future__ import annotations

import statistics
from pathlib import Path

import attrs
import pytest
from scipy.stats import ttest_1samp
from study_cases import plan, row

from benchmarks.tapweight import study
from benchmarks.tapweight.ablation import ABLATIONS, DEVELOPMENT, FRESH, Ablation, gains, report
from benchmarks.tapweight.estimate import estimate
from benchmarks.tapweight.options import parser, plan_of, standard_of
from benchmarks.tapweight.results import Regime
from benchmarks.tapweight.rows import Row, read
from benchmarks.tapweight.variants import method_of

NOISE = (0.3, -0.2, 0.1, 0.0, -0.4, 0.2, 0.5, -0.1, -0.3, -0.1)


def rows(seeds: tuple[int, ...], better: float) -> list[Row]:
    """Return rows of a method, of one that is better by a number, and of one whose differences are noise."""
    made = []
    for seed, noise in zip(seeds, NOISE, strict=True):
        base = {"esol": 2.0 + noise, "bbbp": 0.7 + noise / 10}
        for task, score in base.items():
            gain = (-1 if task == "esol" else 0.1) * (better + noise / 5)
            made += [
                row("rehearsal", task, seed, score),
                row("good", task, seed, score + gain),
                row("noise", task, seed, score + noise / 10),
            ]
    return made


def test_a_gain_is_the_mean_over_tasks_in_units_of_the_reference() -> None:
    own = gains(Regime(rows(DEVELOPMENT, 0.3), "probe"), "rehearsal", ["good", "noise"], DEVELOPMENT)
    good = own["good"]
    assert good.tasks["esol"] == (pytest.approx(0.3), 10)
    assert good.tasks["bbbp"] == (pytest.approx(0.03), 10)
    scaled = [(0.3 + noise / 5) / statistics.stdev(NOISE) for noise in NOISE]
    assert good.mean == pytest.approx(statistics.fmean(scaled))
    assert good.p == pytest.approx(float(ttest_1samp(scaled, 0).pvalue))
    # Holm: the smallest of two is doubled.
    assert good.adjusted == pytest.approx(2 * good.p)
    assert own["noise"].adjusted > 0.05


def test_seeds_without_a_row_of_both_are_left_out() -> None:
    made = [own for own in rows(DEVELOPMENT, 0.3) if (own["method"], own["task"], own["seed"]) != ("good", "bbbp", 3)]
    assert gains(Regime(made, "probe"), "rehearsal", ["good"], DEVELOPMENT)["good"].seeds == 9


@pytest.mark.parametrize(("fresh", "stays"), [(0.3, "GOOD"), (0.0, "none"), (-0.3, "none")])
def test_a_variant_stays_only_if_fresh_seeds_confirm_it(fresh: float, stays: str) -> None:
    text = report([*rows(DEVELOPMENT, 0.3), *rows(FRESH, fresh)], Ablation("rehearsal", ("good", "noise"), "Question?"))
    assert text.count("Gain over REHEARSAL") == 2
    assert text.splitlines()[-1] == f"Significantly better on development and on fresh seeds: {stays.lower()}."
    alone = report(rows(DEVELOPMENT, 0.3), Ablation("rehearsal", ("good", "noise"), "Question?"))
    assert alone.endswith("fresh seeds: none.")


def test_seeds_of_ablations_are_not_those_of_the_study() -> None:
    for modality in ("molecules", "text"):
        assert not {*DEVELOPMENT, *FRESH} & {*standard_of(modality).seeds}
    assert not {*DEVELOPMENT} & {*FRESH}


def test_the_variants_of_every_ablation_exist() -> None:
    for ablation in ABLATIONS.values():
        for name in (ablation.reference, *ablation.variants):
            assert method_of(name).name == name


def test_the_plan_counts_the_missing_rows_and_their_passes(tmp_path: Path) -> None:
    own = plan(tmp_path, methods=("equal", "rehearsal"), passes=40, seeds=(0,))
    file = tmp_path / "rows.jsonl"
    before = estimate(own, file).splitlines()
    # Equal weights are shared by the tasks: 20 steps of 2 views. Rehearsals, 32 passes, are shared, and 8 are the main runs'.
    assert before[2].startswith("| equal | 2 | 40 |")
    assert before[3].startswith("| rehearsal | 2 | 48 |")
    study.run(own, file)
    assert estimate(own, file).splitlines()[-1].startswith("0 rows to compute")


def test_the_variants_of_rehearsals_spend_the_budget_and_no_more(tmp_path: Path) -> None:
    names = ABLATIONS["rehearsal"].variants
    own = plan(tmp_path, methods=("rehearsal", *names), passes=90, seeds=(0,), tasks=("bbbp",))
    assert study.run(own, tmp_path / "rows.jsonl") == []
    by_name = {made["method"]: made for made in read([tmp_path / "rows.jsonl"])}
    assert by_name.keys() == {"rehearsal", *names}
    for name, made in by_name.items():
        assert 80 < made["passes"] <= 90, name
        assert sum(made["weights"].values()) == pytest.approx(1), name


def test_a_method_with_other_settings_runs_as_in_a_plan_with_them(tmp_path: Path) -> None:
    own = plan(tmp_path, methods=("tapweight:gamma=1,every=2", "tapweight"), seeds=(0,), tasks=("esol",), passes=40)
    study.run(own, tmp_path / "tuned.jsonl")
    tuned, base = read([tmp_path / "tuned.jsonl"])
    other = attrs.evolve(own, methods=("tapweight",), settings=attrs.evolve(own.settings, gamma=1, every=2))
    study.run(other, tmp_path / "other.jsonl")
    (same,) = read([tmp_path / "other.jsonl"])
    assert (tuned["score"], tuned["weights"], tuned["passes"]) == (same["score"], same["weights"], same["passes"])
    assert tuned["weights"] != base["weights"]


def test_the_command_line_takes_variants() -> None:
    options = parser("molecules").parse_args(["--methods", "rehearsal-halving", "equal:scale=none"])
    assert plan_of(standard_of("molecules"), options).methods == ("rehearsal-halving", "equal:scale=none")
