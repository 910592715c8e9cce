"""The commands of the study: errors in one sentence before any work, plans of what can be run, and rows after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest
from study_cases import plan

from benchmarks.tapweight import estimate as estimates
from benchmarks.tapweight.command import main
from benchmarks.tapweight.estimate import estimate
from benchmarks.tapweight.molecules import MoleculeStudy
from benchmarks.tapweight.options import parser, plan_of, standard_of
from mlopt.errors import ArgumentError


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("molecule", "there is no command 'molecule'; .*did you mean 'molecules'"),
        ("ablation", "name an ablation first: rehearsal, length, .*; then molecules or text"),
        ("ablation --plan", "name an ablation first"),
        ("ablation rehearsals text", "there is no ablation 'rehearsals'; .*did you mean 'rehearsal'"),
        ("ablation rehearsal texts", "there is no modality 'texts'; .*did you mean 'text'"),
        ("ablation scale text --tasks esol", "there is no task 'esol'; available: 'csabstruct'"),
        ("molecules --tasks esols", "there is no task 'esols'; .*did you mean 'esol'"),
        ("--tasks cola", "there is no task 'cola'; available: 'bbbp'"),
        ("text --tasks esol", "there is no task 'esol'; available: 'csabstruct'"),
        ("molecules --methods equals", "there is no method 'equals'; .*did you mean 'equal'"),
        ("molecules --methods single:keywords", "no objective of this study 'keywords'; available: 'masked_atoms'"),
        ("molecules --objectives keywords", "there is no objective 'keywords'; available: 'masked_atoms'"),
        ("text --objectives charges", "there is no objective 'charges'; available: 'masked_tokens'"),
    ],
)
def test_a_wrong_name_is_an_error_that_lists_the_names(command: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=sentence):
        main([*command.split(), *(["--data", str(tmp_path)] if "--" in command else [])])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--labels few", "argument --labels: 'few' is not a number of at least 1"),
        ("--labels 0", "argument --labels: '0' is not a number of at least 1"),
        ("--passes -1", "argument --passes: '-1' is not a number of at least 1"),
        ("--processes 0", "argument --processes: '0' is not a number of at least 1"),
        ("--from-scratch", "unrecognized arguments: --from-scratch"),
        ("--data nowhere", "no folder nowhere: give --data, or your own files"),
        ("--corpus here.csv", "--corpus and --table go together"),
        ("--corpus here.csv --table gone.csv", "--table: there is no file gone.csv"),
        ("--corpus gone.csv --table here.csv", "--corpus: there is no file gone.csv"),
        ("--corpus here.csv --table here.csv --tasks esol", "--table is a task of your own; give one of them"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_read(
    options: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here.csv").touch()
    with pytest.raises(SystemExit):
        main(["molecules", *options.split()])
    assert sentence in capsys.readouterr().err


def test_an_entry_that_is_given_twice_is_run_once() -> None:
    given = "--tasks esol esol --methods equal direct equal --seeds 3 3 --labels 50 50"
    own = plan_of(standard_of("molecules"), parser("molecules").parse_args(given.split()))
    assert (own.tasks, own.methods, own.seeds, own.labels) == (("esol",), ("equal", "direct"), (3,), (50,))


def test_the_plan_names_what_cannot_be_run(tmp_path: Path) -> None:
    (tmp_path / "mol").mkdir()
    own = plan(tmp_path, methods=("direct", "equal", "tapweight"), passes=5, seeds=(0,))
    (tmp_path / "mol" / "bbbp.csv").write_text("smiles,bbbp\nCCO,1\nCCN,0\nCCC,1\nCCCC,0\n")
    lines = estimate(own, tmp_path / "rows.jsonl").splitlines()
    assert lines[2].startswith("| direct | 1 | 0 |")
    assert lines[3].startswith("| equal | 1 | 4 |")
    assert lines[5].startswith("Cannot be computed: bbbp: --labels 20: the task has 2 examples besides the test set")
    assert lines[7].startswith("Cannot be computed: tapweight: passes=5: the shortest run of tapweight takes")
    assert lines[9].startswith("2 rows to compute: about")


def test_the_plan_prepares_a_corpus_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = []
    recipe = MoleculeStudy.recipe

    def counted(self: MoleculeStudy, *arguments: object) -> object:
        prepared.append(arguments[0])
        return recipe(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(MoleculeStudy, "recipe", counted)
    own = plan(tmp_path, methods=("direct", "equal"), seeds=(0, 1))
    estimate(own, tmp_path / "rows.jsonl")
    assert prepared == ["corpus"]


def test_the_plan_times_each_task_on_its_own_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    features = estimates.labelled_features

    def counted(encoder: object, task: object, splits: object) -> object:
        sizes.append([len(task.splits[split]) for split in splits])  # type: ignore[attr-defined]
        return features(encoder, task, splits)  # type: ignore[arg-type]

    monkeypatch.setattr(estimates, "labelled_features", counted)
    own = plan(tmp_path, methods=("direct",), seeds=(0,), labels=(10,), test_limit=30)
    table = (tmp_path / "mol" / "bbbp.csv").read_text().splitlines()
    (tmp_path / "mol" / "bbbp.csv").write_text("\n".join(table[:51]))
    estimate(own, tmp_path / "rows.jsonl")
    assert [parts for parts in sizes if len(parts) == 2] == [[8, 2], [8, 2]]
    # The scaffolds of half of 72 molecules, of which 30 are drawn; those of 50 molecules that fit into half of them.
    assert [parts for parts in sizes if len(parts) == 1] == [[30], [24]]
