"""Several processes share a run of TapWeight: the result is that of one process, bit for bit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sharing_cases
import torch
from command_cases import Case, same_run, succeed
from hypothesis import given
from hypothesis import strategies as st
from processes import in_processes

import mlopt
from mlopt.ranks import ALONE
from mlopt.recipes.tapweight.sharing import owners_of, shared

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.usefixtures("one_thread")


def evaluate(folder: Path, names: list[str]) -> dict[str, Any]:
    return {name: getattr(sharing_cases, name)(folder / name) for name in names}


def same(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of one process that a signal ended, and later with the outcomes of two."""
    folder = tmp_path_factory.mktemp("two")
    assert sharing_cases.signalled(folder / "fitted") == "interrupted"
    return folder


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    names = ["whole", "fitted", "diverging", "differing", "other_labels", "replaced", "signalled", "cut_short"]
    return in_processes(2, evaluate, folder, names, folder=folder)


def test_two_processes_return_the_result_of_one(two: list[dict[str, Any]], tmp_path: Path) -> None:
    expected = sharing_cases.whole(tmp_path)
    for own in two:
        for part, value in expected.items():
            assert same(own["whole"][part], value), part


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return sharing_cases.fitted(tmp_path_factory.mktemp("uninterrupted"))


def begun(folder: Path) -> dict[str, str]:
    """Return the newest checkpoint of each phase that has one."""
    steps = {phase.name: sorted(step.name for step in phase.iterdir()) for phase in folder.iterdir() if phase.is_dir()}
    return {phase: own[-1] for phase, own in steps.items() if own}


def test_a_run_of_one_process_resumes_on_two(two: list[dict[str, Any]], uninterrupted: dict[str, Any]) -> None:
    assert same(two[0]["fitted"], uninterrupted)
    assert same(two[1]["fitted"], uninterrupted)


def test_a_signal_to_one_process_ends_both_and_one_process_resumes(
    two: list[dict[str, Any]], folder: Path, uninterrupted: dict[str, Any]
) -> None:
    assert [own["signalled"] for own in two] == ["interrupted"] * 2
    saved = begun(folder / "signalled")
    assert saved["tapweight"] == "step-00000003"
    assert saved["rehearsal"], "the phase of the second process"
    assert same(sharing_cases.fitted(folder / "signalled"), uninterrupted)


def test_an_error_in_one_process_ends_the_phase_of_the_other_and_one_process_resumes(
    two: list[dict[str, Any]], folder: Path, uninterrupted: dict[str, Any]
) -> None:
    assert [own["cut_short"] for own in two] == [
        ("ProcessError", "process 1 of 2 raised KeyError: 'no such example'"),
        ("KeyError", "'no such example'"),
    ]
    ((phase, newest),) = begun(folder / "cut_short").items()
    assert phase == "rehearsal-0-square"
    assert newest < "step-00000004", "the last step of the phase"
    assert same(sharing_cases.fitted(folder / "cut_short"), uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 4), (2, 4), (4, 1), (4, 2)])
def test_a_run_resumes_on_any_number_of_processes(
    before: int, after: int, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    def on(size: int, work: Any) -> list[Any]:
        meeting = tmp_path / work.__name__
        meeting.mkdir()
        return [work(tmp_path / "run")] if size == 1 else in_processes(size, work, tmp_path / "run", folder=meeting)

    assert on(before, sharing_cases.signalled) == ["interrupted"] * before
    assert all(same(own, uninterrupted) for own in on(after, sharing_cases.fitted))


@pytest.mark.parametrize(
    ("name", "kind", "part"),
    [
        ("diverging", "NonFiniteError", "process 1 of 2 raised NonFiniteError: rehearsal of "),
        (
            "differing",
            "ProblemError",
            "the variables of the encoder or of the objectives' heads differ between process 0 and",
        ),
        (
            "replaced",
            "ArgumentError",
            "the encoder of another encoder has a different architecture from the encoder of the run",
        ),
    ],
)
def test_an_error_is_raised_in_both(two: list[dict[str, Any]], name: str, kind: str, part: str) -> None:
    assert [own[name][0] for own in two] == [kind, kind]
    assert part in two[0][name][1]


def test_a_launcher_without_a_group_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(mlopt.ProblemError, match=r"TapWeight.fit: this is one of 2 processes .*init_process_group"):
        sharing_cases.recipe().fit(8, progress=False)


@given(st.lists(st.floats(0.0, 100.0), max_size=12), st.integers(1, 5))
def test_tasks_are_divided_evenly(costs: list[float], size: int) -> None:
    owners = owners_of(costs, size)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(size)]
    assert len(owners) == len(costs)
    assert not owners or owners[0] == 0
    # No process has more than its share and one task, the bound of Graham (1966).
    assert max(loads) <= sum(costs) / size + max(costs, default=0.0) + 1e-9


def test_a_process_alone_does_all_tasks_as_they_are() -> None:
    result = object()
    assert shared(ALONE, [lambda: result, lambda: 2], [1, 1], send=None)[0] is result  # type: ignore[arg-type]


def launched(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command on two processes by torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mlopt"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*launcher, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=environment,
    )


def test_a_command_on_two_processes_writes_the_files_of_one_and_one_resumes(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(case.folder)
    methods = "--methods equal rehearsal tapweight --objectives"
    objectives = {"molecules": "masked_atoms contrastive", "text": "masked_tokens contrastive"}[case.name]
    more = [*methods.split(), *objectives.split(), "--steps", "4", "--rehearsals", "1", "--ensemble", "2"]
    done = launched(case.options("two", *more, size=case.small), case.folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Saved in ") == 1
    assert done.stdout.count("2 processes share the phases") == 1
    alone = case.run("one", *more, size=case.small)
    both = case.folder / "two"
    assert same_run(both, alone)
    # As if both had been killed: without the results, some phases, and the end of another.
    for path in both.iterdir():
        if path.name != "checkpoints":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for phase in (both / "checkpoints").glob("finetuning-*"):
        shutil.rmtree(phase)
    kept = {file: file.stat().st_mtime_ns for file in (both / "checkpoints" / "rehearsal").rglob("*") if file.is_file()}
    assert kept
    succeed([*case.options("two", *more, size=case.small), "--resume"])
    assert same_run(both, alone)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept


def test_the_command_refuses_in_every_process(molecules: Case) -> None:
    done = launched(molecules.options("refused-by-each", "--steps", "3", "--every", "4"), molecules.folder)
    assert done.returncode != 0
    assert "mlopt: steps=3 at every=4: the weights never move; take at least 4 steps" in done.stderr
    assert not (molecules.folder / "refused-by-each").exists()


def test_a_plan_is_printed_once_and_writes_nothing(molecules: Case) -> None:
    done = launched(molecules.options("planned", "--steps", "4", "--plan"), molecules.folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("encoder passes") == 1
    assert not (molecules.folder / "planned").exists()


def test_a_command_that_writes_one_file_refuses_a_launcher(molecules: Case) -> None:
    done = launched(["tapweight", "predict", "run", "--input", "new.csv", "--output", "out.csv"], molecules.folder)
    assert done.returncode != 0
    assert "runs in one process, and this is one of 2" in done.stderr
