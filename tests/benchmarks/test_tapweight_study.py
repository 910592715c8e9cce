"""A study resumes row by row, shares encoders that do not depend on labels, and writes what it measured."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import attrs
import pytest
from study_cases import plan

from benchmarks.tapweight import study
from benchmarks.tapweight.plan import PLAIN, Cell
from benchmarks.tapweight.rows import Row, Rows, read
from mlopt.recipes.tapweight.files import DataError
from mlopt.recipes.tapweight.methods import FixedWeights, Rehearsal, ThreeLevels
from mlopt.recipes.tapweight.settings import Settings
from mlopt.recipes.tapweight.significance import errors_of_shares, shares_of_best
from mlopt.rng import derive_seed
from mlopt.solving.engine import Engine


class Stopped(BaseException):
    """As a killed process: no handler of errors catches it."""


def scores(file: Path) -> dict[Cell, tuple[float, Any]]:
    return {
        Cell(**{name: row[name] for name in attrs.fields_dict(Cell)}): (row["score"], row["weights"])
        for row in read([file])
    }


@pytest.fixture
def adapted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often a method adapts an encoder."""
    counts: Counter[str] = Counter()

    def counting(kind: Any) -> None:
        adapt = kind.adapt

        def counted(self: Any, *arguments: Any) -> Any:
            counts[self.name] += 1
            return adapt(self, *arguments)

        monkeypatch.setattr(kind, "adapt", counted)

    counting(FixedWeights)
    counting(ThreeLevels)
    return counts


def test_methods_without_labels_adapt_once_a_seed(tmp_path: Path, adapted: Counter[str]) -> None:
    own = plan(tmp_path, labels=(20, "all"), finetunings=("probe", "full"))
    assert study.run(own, tmp_path / "rows.jsonl") == []
    rows = read([tmp_path / "rows.jsonl"])
    assert len(rows) == 2 * 2 * 2 * 2 * 4  # seeds, tasks, label counts, finetunings, methods
    assert adapted["equal"] == 2
    assert adapted["single:masked_atoms"] == 2
    # Once for each seed, task and number of labels.
    assert adapted["tapweight"] == 8


def test_a_stopped_study_continues_and_ends_as_if_it_had_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, whole, stopped = plan(tmp_path), tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    study.run(own, whole)
    written: list[Cell] = []
    append = Rows.append

    def counted(self: Rows, cell: Cell, **measured: Any) -> Row:
        written.append(cell)
        if len(written) == 6:
            with self.file.open("a") as file:
                file.write('{"key": "half a')
            raise Stopped
        return append(self, cell, **measured)

    monkeypatch.setattr(Rows, "append", counted)
    with pytest.raises(Stopped):
        study.run(own, stopped)
    assert len(read([stopped])) == 5
    study.run(own, stopped)
    # The sixth row was not written the first time; no other is computed twice.
    assert len(written) == len(set(written)) + 1 == 17
    assert scores(stopped) == scores(whole)
    study.run(own, stopped)
    assert len(written) == 17


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the number of steps of all runs, in a list."""
    count, step = [0], Engine.step

    def counted(self: Any) -> Any:
        count[0] += 1
        return step(self)

    monkeypatch.setattr(Engine, "step", counted)
    return count


def test_tasks_share_rehearsals_and_nothing_else(tmp_path: Path, steps: list[int]) -> None:
    own = plan(tmp_path, methods=("rehearsal",), seeds=(0,), passes=40)
    study.run(own, tmp_path / "both.jsonl")
    both, steps[0] = steps[0], 0
    for task in own.tasks:
        study.run(attrs.evolve(own, tasks=(task,)), tmp_path / "each.jsonl")
    assert scores(tmp_path / "both.jsonl") == scores(tmp_path / "each.jsonl")
    # Of 40 passes, two rehearsals of 6 steps on each of two objectives take 24, and their features 8; the main run has the rest.
    assert [row["steps"] for row in read([tmp_path / "both.jsonl"])] == [8, 8]
    # Both tasks together rehearse once, and have a main run each.
    assert (both, steps[0]) == (24 + 2 * 8, 2 * (24 + 8))
    assert not list(tmp_path.glob("*.work/*/*"))


def test_methods_of_the_same_rehearsals_share_them(tmp_path: Path, steps: list[int]) -> None:
    own = plan(tmp_path, methods=("rehearsal", "rehearsal:rehearsals=1"), seeds=(0,), passes=40)
    study.run(own, tmp_path / "both.jsonl")
    # Two rehearsals of 24 steps together; main runs of 8 steps, and of 24 after one rehearsal, on each of two tasks.
    assert steps[0] == 24 + 2 * 8 + 2 * 24
    for method in own.methods:
        study.run(attrs.evolve(own, methods=(method,)), tmp_path / "each.jsonl")
    assert scores(tmp_path / "both.jsonl") == scores(tmp_path / "each.jsonl")
    # Shorter rehearsals are others.
    steps[0] = 0
    study.run(attrs.evolve(own, methods=("rehearsal", "rehearsal:rehearsal_steps=3")), tmp_path / "other.jsonl")
    assert steps[0] == 24 + 2 * 8 + 2 * (12 + 20)


def test_other_settings_are_other_rows(tmp_path: Path) -> None:
    file, own = tmp_path / "rows.jsonl", plan(tmp_path, methods=("direct",), seeds=(0,), tasks=("esol",))
    for changed in (own, attrs.evolve(own, passes=31), attrs.evolve(own, settings=Settings(batch_size=8)), own):
        study.run(changed, file)
    assert len(file.read_text().splitlines()) == 3
    more = attrs.evolve(own, tasks=("esol", "bbbp"), seeds=(0, 1), device="cpu")
    assert more.key == own.key
    study.run(more, file)
    assert len(file.read_text().splitlines()) == 3 + 3


def test_several_processes_write_the_same_rows(tmp_path: Path) -> None:
    own = plan(tmp_path, tasks=("esol",), methods=("direct", "equal"))
    study.run(own, tmp_path / "one.jsonl")
    study.run(own, tmp_path / "two.jsonl", processes=2)
    assert scores(tmp_path / "one.jsonl") == scores(tmp_path / "two.jsonl")


def test_a_row_says_what_it_measured(tmp_path: Path) -> None:
    study.run(plan(tmp_path, tasks=("esol",), seeds=(3,), methods=(PLAIN, "tapweight")), tmp_path / "rows.jsonl")
    plain, learned = read([tmp_path / "rows.jsonl"])
    assert (plain["title"], plain["passes"], plain["weights"]) == ("ECFP + ridge, no encoder", 0, None)
    # Lengths are a sum over substructures, which plain features count; the mean of all lengths has an error of 2.
    assert plain["score"] < 1.5
    assert learned["weights"].keys() == {"masked_atoms", "random_labels"}
    assert sum(learned["weights"].values()) == pytest.approx(1)
    assert 20 < learned["passes"] <= 30 == learned["budget"]
    assert learned["seconds"] > 0
    assert learned["sizes"] == {"train": 16, "valid": 4, "test": 36}
    assert (learned["control"], learned["judged"], learned["metric"]) == ("random_labels", True, "rmse")
    assert learned["weight_errors"] is None


def test_a_row_has_the_bootstrap_errors_of_its_weights(tmp_path: Path) -> None:
    own = plan(tmp_path, tasks=("esol",), seeds=(0,), methods=("rehearsal",), passes=60)
    study.run(own, tmp_path / "rows.jsonl")
    (row,) = read([tmp_path / "rows.jsonl"])
    modality = study.modality_of(own)
    prepared = modality.recipe("corpus", modality.task("esol", 0, 20), 0).experiment(1, progress=False)
    experiment = prepared.affordable(Rehearsal(), 60)
    losses, seed = Rehearsal().rehearse(experiment), derive_seed(0, "bootstrap")
    assert [*row["weights"].values()] == shares_of_best(losses, seed).tolist()
    assert [*row["weight_errors"].values()] == errors_of_shares(losses, seed).tolist()
    assert row["weight_errors"].keys() == row["weights"].keys()
    # The phases that tasks share are removed with their folder.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mol", "rows.jsonl"]


def test_a_cell_that_cannot_be_run_is_named_and_the_others_are_run(tmp_path: Path) -> None:
    own = plan(tmp_path, tasks=("esol",), seeds=(0,), methods=("tapweight", "equal"), passes=5)
    (fault,) = study.run(own, tmp_path / "rows.jsonl")
    assert fault.startswith("tapweight on esol, seed 0: ")
    assert [row["method"] for row in read([tmp_path / "rows.jsonl"])] == ["equal"]


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"key": "x"}\n')
    with pytest.raises(DataError, match="line 1: not a row"):
        read([file])
