"""The plan of a run: it states what the run then does, checks what the run checks, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import attrs
import pytest
import torch
from command_cases import Case, succeed
from tapweight_cases import F64, SETTINGS, Encoder, Sum, recipe

import mlopt
from mlopt import cli
from mlopt.recipes.tapweight import experiment, finetuning
from mlopt.recipes.tapweight.finetuning import finetune, finetuning_cost
from mlopt.recipes.tapweight.methods import METHODS
from mlopt.recipes.tapweight.phases import Phases
from mlopt.recipes.tapweight.plan import Part, Plan

pytestmark = pytest.mark.usefixtures("one_thread")
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str | None, int]]]:
    """Collect the title and the steps of each phase that is solved."""
    phases: list[tuple[str | None, int]] = []
    solve = mlopt.solve

    def record(problem: mlopt.Problem, steps: int, *, callbacks: list[mlopt.Callback], **options: object) -> object:
        titles = [each.description for each in callbacks if isinstance(each, mlopt.ProgressDisplay)]
        phases.append((titles[0] if titles else None, steps))
        return solve(problem, steps, callbacks=callbacks, **options)

    monkeypatch.setattr(experiment.mlopt, "solve", record)
    return phases


class Counted(Encoder):
    """Counts its evaluations."""

    count = 0

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        Counted.count += 1
        return super().forward(batch)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_states_the_phases_that_it_solves(name: str, solved: list[tuple[str | None, int]]) -> None:
    """`every` tells outer steps from steps of pretraining, and the rehearsals are shorter than the main run."""
    settings = attrs.evolve(SETTINGS, every=2, rehearsals=3, rehearsal_steps=4, measurements=2)
    made = recipe(settings=settings)
    method = METHODS[name]()
    stated = method.phases(made.experiment(8))
    method.adapt(made.experiment(8, progress=False))
    assert [steps for _, steps in solved] == list(stated)


def test_the_phases_of_a_run_are_numbered_and_named(solved: list[tuple[str | None, int]], capsys: Captured) -> None:
    settings = attrs.evolve(SETTINGS, rehearsal_steps=2, ensemble=2)
    made = recipe(settings=settings)
    made.fit(5, methods=["equal", "rehearsal"])
    assert solved == [
        ("[1/9] rehearsal 1 of 4 (linear)", 2),
        ("[2/9] rehearsal 2 of 4 (square)", 2),
        ("[3/9] rehearsal 3 of 4 (linear)", 2),
        ("[4/9] rehearsal 4 of 4 (square)", 2),
        ("[5/9] pretraining (rehearsal)", 5),
        ("[6/9] pretraining (equal)", 5),
        ("[7/9] finetuning (equal)", 6),  # 24 training examples in batches of 8, twice
        ("[8/9] finetuning 1 of 2 (rehearsal)", 6),
        ("[9/9] finetuning 2 of 2 (rehearsal)", 6),
    ]
    assert capsys.readouterr().err == ""
    plan = made.plan(5, methods=["equal", "rehearsal"])
    assert sorted(plan.whole.phases) == sorted(steps for _, steps in solved)


def test_phases_beyond_the_stated_ones_have_a_number_of_their_own() -> None:
    phases = Phases(total=1)
    assert [phases.next(title).description for title in "ab"] == ["[1/1] a", "[2] b"]
    assert [Phases().next(title).description for title in "a"] == ["[1] a"]


def test_a_run_without_progress_shows_nothing(solved: list[tuple[str | None, int]], capsys: Captured) -> None:
    recipe().fit(2, methods=["equal"], progress=False)
    assert solved == [(None, 2), (None, 6)]
    assert capsys.readouterr() == ("", "")


def test_the_plan_changes_no_result() -> None:
    shown, silent = (recipe().fit(4, progress=progress) for progress in (True, False))
    assert (shown.weights, shown.scores) == (silent.weights, silent.scores)


@pytest.mark.parametrize("frozen", [True, False])
def test_the_cost_of_finetuning_counts_the_evaluations_of_the_encoder(frozen: bool) -> None:
    """300 test examples are scored in two batches, twice."""
    settings = attrs.evolve(SETTINGS, epochs=3, freeze_encoder=frozen)
    sizes = {"train": 20, "valid": 10, "test": 300}
    task = Sum({split: list(torch.randn(size, 3, dtype=F64)) for split, size in sizes.items()})
    encoder = Counted()
    state, before = torch.get_rng_state(), {name: p.clone() for name, p in encoder.state_dict().items()}
    cost = finetuning_cost(encoder, task, settings, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in encoder.state_dict().items())
    Counted.count = 0
    finetune(encoder, task, settings, seed=0, solve=partial(mlopt.solve, progress=False))
    assert (cost.steps, cost.passes) == (6, 6 + 3 + 4)
    assert Counted.count == cost.passes


def test_the_time_of_finetuning_follows_from_that_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of 3 s each are timed: 24 examples are two batches of 10. A forward pass is a third of a step."""
    ticks = iter([100.0, 106.0])
    monkeypatch.setattr(finetuning.time, "perf_counter", lambda: next(ticks))
    settings = attrs.evolve(SETTINGS, epochs=5, task_batch_size=10)
    cost = finetuning_cost(Encoder(), recipe().task, settings, seed=0)
    assert cost.steps == 10
    assert cost.seconds == pytest.approx(10 * 3 + (5 * 24 + 2 * 24) / 10 * 1)


def test_the_time_of_pretraining_follows_from_that_of_a_pass() -> None:
    made = attrs.evolve(recipe().experiment(1), seconds_per_pass=0.5)
    assert made.seconds(840) == 420


def test_the_text_and_the_table_of_a_plan() -> None:
    methods = {
        "direct": Part(phases=(), passes=0, seconds=0.0),
        "rehearsal": Part(phases=(100, 100, 2_000), passes=6_600, seconds=600.0),
    }
    plan = Plan(methods=methods, finetuning=Part(phases=(390, 390), passes=800, seconds=45.0))
    assert str(plan) == (
        "Pretraining takes at most 6,600 encoder passes (direct 0, rehearsal 6,600): about 10 minutes on this machine. "
        "Finetuning takes at most 800: about 45 seconds."
    )
    rows = list(zip(*(column.cells for column in plan.table().columns), strict=True))
    assert rows == [
        ("direct", "none", "0", ""),
        ("rehearsal", "2 of 100 steps, 1 of 2,000 steps", "6,600", "10 minutes"),
        ("finetuning", "2 of 390 steps", "800", "45 seconds"),
        ("together", "5 phases", "7,400", "11 minutes"),
    ]


def planned(case: Case, output: str, *more: str, capsys: Captured) -> str:
    """Return what a plan prints; nothing changes in the folder of the data."""
    before = contents(case.folder)
    capsys.readouterr()
    # Some of these runs have no method that measures signals.
    succeed(case.options(output, *more, "--plan", size=case.fast.replace("--measurements 2", "")))
    assert contents(case.folder) == before
    return " ".join(capsys.readouterr().out.split())


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() if file.is_file() else b"" for file in folder.rglob("*")}


SPLITS = {
    "molecules": "regression of length, scored by rmse; molecules: 32 train, 4 valid, 4 test.",
    "text": "classification into kind, unkind, scored by accuracy; texts: 40 train, 16 valid, 16 test.",
}


def test_the_command_states_the_run_and_leaves_nothing_behind(case: Case, capsys: Captured) -> None:
    more = ["--methods", "direct", "rehearsal", "--rehearsal-steps", "3", "--seeds", "0", "1"]
    printed = planned(case, "planned", *more, capsys=capsys)
    assert f"Task: {SPLITS[case.name]}" in printed
    assert "│ rehearsal │ 4 of 3 steps, 1 of 4 steps │" in printed
    assert printed.count("│ together │ 7 phases │") == 2
    assert printed.endswith(" on this machine for 2 seeds. Nothing was trained or written.")
    assert not (case.folder / "planned").exists()


def test_the_command_counts_the_rows_left_out_by_reason(molecules: Case, capsys: Captured) -> None:
    rows = (molecules.folder / "train.csv").read_text()
    file = molecules.folder / "gaps.csv"
    file.write_text(f"{rows},1,1\n,2,1\nC1CC,3,1\n")
    printed = planned(molecules, "planned", "--train", str(file), capsys=capsys)
    assert (
        "Left out of gaps.csv: 2 rows (the SMILES is empty). Left out of gaps.csv: 1 row (not valid SMILES)." in printed
    )
    assert "Left out of corpus.smi: 1 row (not valid SMILES)." in printed


def test_a_plan_is_refused_as_the_run_is(case: Case, capsys: Captured) -> None:
    finished = case.finished()
    before = contents(finished)
    for more, sentence in (
        (["--output", str(finished)], "already holds a result"),
        (["--output", str(finished), "--resume"], "resume with the same configuration"),
        (["--train", "nothing.csv"], "nothing.csv: no such file"),
        (["--steps", "3", "--every", "4"], "steps=3 at every=4"),
    ):
        capsys.readouterr()
        assert cli.main(case.options("planned", *more, "--plan")) == 2
        assert sentence in capsys.readouterr().err
    succeed(case.options("planned", "--output", str(finished), "--overwrite", "--plan"))
    assert contents(finished) == before
