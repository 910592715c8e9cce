"""An error in one process of the command ends all of them with one sentence on the cause, and leaves no files behind."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_cases import Case, merged
from processes import in_processes

from mlopt import cli


def _other_row(folder: Path) -> None:
    lines = (folder / "train.csv").read_text().splitlines()
    lines[7] = lines[7].replace(",", ",1", 1)
    (folder / "train.csv").write_text("\n".join(lines) + "\n")


def _nothing(folder: Path) -> None:
    pass


#: What one process has in its own folder, and its own options: its number, the change, the options, and the one sentence.
CASES: dict[str, tuple[int, Callable[[Path], Any], list[str], str]] = {
    "file": (
        1,
        lambda folder: (folder / "corpus.smi").unlink(),
        [],
        "corpus.smi: no such file; give the path of a data file",
    ),
    "file of the first": (0, lambda folder: (folder / "train.csv").unlink(), [], "train.csv: no such file; give"),
    "content": (
        1,
        _other_row,
        [],
        "the examples of the train split differ between process 0 and process 1; build the same",
    ),
    "option": (1, _nothing, ["--stepz", "3"], "there is no option --stepz; did you mean --steps?"),
    "seed": (
        1,
        _nothing,
        ["--seed", "1"],
        "process 0 has seeds=(0,), and process 1 has seeds=(1,); start all processes with",
    ),
    "plan": (
        1,
        _nothing,
        ["--plan"],
        "process 0 has plan=False, and process 1 has plan=True; start all processes with the same",
    ),
    "settings": (
        0,
        _nothing,
        ["--epochs", "3"],
        "process 0 has settings.epochs=3, and process 1 has settings.epochs=2; start",
    ),
}


def ended(folder: Path, options: list[str]) -> dict[str, tuple[int, str]]:
    """Return the exit status and the standard error of each case in this process."""
    rank = int(os.environ["RANK"])
    outcomes = {}
    for name, (where, change, more, _) in CASES.items():
        own = folder / f"{name} {rank}"
        shutil.copytree(folder / "data", own)
        os.chdir(own)
        arguments = [*options, "--output", str(folder / f"output of {name}")]
        if rank == where:
            change(own)
            arguments = merged([*arguments, *more])
        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
            status = cli.main(["tapweight", "molecules", *arguments])
        outcomes[name] = status, said.getvalue()
    return outcomes


@pytest.fixture(scope="module")
def folder(molecules: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ended")
    (folder / "data").mkdir()
    for name in ("corpus.smi", "train.csv"):
        shutil.copy(molecules.folder / name, folder / "data")
    return folder


@pytest.fixture(scope="module")
def two(folder: Path, molecules: Case) -> list[dict[str, tuple[int, str]]]:
    files = ["--corpus", "corpus.smi", "--train", "train.csv", "--labels", "length"]
    return in_processes(2, ended, folder, [*files, *molecules.fast.split()], folder=folder)


@pytest.mark.parametrize("name", CASES)
def test_one_sentence_names_the_cause(two: list[Any], folder: Path, name: str) -> None:
    assert [own[name][0] for own in two] == [2, 2]
    (said,) = filter(None, [own[name][1] for own in two])
    assert said.startswith("mlopt: ")
    assert said.count("\n") == 1
    assert CASES[name][3] in said
    output = folder / f"output of {name}"
    assert not output.exists() or not any(output.iterdir())
