"""The command of each modality: the results of a run, its repetition, and the errors of a user."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path

import pytest
from command_cases import Case, load, same_run, succeed
from text_cases import encoder

from mlopt import cli
from mlopt.recipes.tapweight.configuration import read

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_saves_its_weights_history_scores_and_picture(case: Case) -> None:
    finished = case.finished()
    learned = load(finished, "weights.json")
    names = list(case.configuration().objectives)
    assert list(learned["weights"]) == list(learned["signals"]) == names
    assert sum(learned["weights"].values()) == pytest.approx(1, abs=1e-6)
    assert learned["verdict"].endswith(".")
    with open(finished / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, case.rows + 1))
    for row in rows:
        assert sum(float(row[f"reweighting/weight/{name}"]) for name in names) == pytest.approx(1, abs=1e-6)
        assert all(float(row[f"{level}/loss"]) > 0 for level in ("pretraining", "finetuning", "reweighting"))
    scores = load(finished, "scores.json")
    assert scores["metric"] == case.metric
    assert list(scores["scores"]) == ["direct", "equal", "rehearsal", "tapweight"]
    assert all(0 < score[split] < 10 for score in scores["scores"].values() for split in ("valid", "test"))
    assert (finished / "weights.png").read_bytes().startswith(b"\x89PNG")
    assert "torch" in load(finished, "environment.json")["packages"]


def test_a_run_is_repeated_bit_for_bit_from_its_configuration_and_from_any_folder(
    case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    finished = case.finished()
    saved = read(finished / "config.json", case.configuration)
    assert (saved.output, saved.data.train.parent) == (finished, case.folder)
    assert (saved.seeds, saved.device, saved.settings) == ((3,), "cpu", case.settings)
    assert saved.steps // saved.settings.every == case.rows
    monkeypatch.chdir(tmp_path)
    succeed([*case.command, "--config", str(finished / "config.json"), "--output", "again"])
    assert same_run(finished, tmp_path / "again")


def test_several_seeds_are_runs_of_their_own_and_a_summary(case: Case) -> None:
    """Seed 1 alone returns the same: a run leaves nothing to the next, such as targets on the examples."""
    first = case.configuration().objectives[0]
    several = case.run("several", "--seeds", "0", "1", "--objectives", first, "random_labels")
    names = {"checkpoints", "config.json", "seed-0", "seed-1", "summary.json"}
    assert {path.name for path in several.iterdir()} - {"skipped.csv"} == names
    assert read(several / "config.json", case.configuration).seeds == (0, 1)
    assert not same_run(several / "seed-0", several / "seed-1")
    succeed(
        [*case.command, "--config", str(several / "seed-1" / "config.json"), "--output", str(case.folder / "alone")]
    )
    assert same_run(several / "seed-1", case.folder / "alone")
    summary = load(several, "summary.json")
    weights = [load(several, seed, "weights.json")["weights"][first] for seed in ("seed-0", "seed-1")]
    tests = [load(several, seed, "scores.json")["scores"]["tapweight"]["test"] for seed in ("seed-0", "seed-1")]
    for spread, values in ((summary["weights"][first], weights), (summary["scores"]["tapweight"]["test"], tests)):
        assert spread["mean"] == pytest.approx(statistics.fmean(values))
        assert spread["std"] == pytest.approx(statistics.stdev(values))


def test_a_run_that_is_not_finite_names_the_place_and_keeps_its_state(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(case.options("infinite", "--pretraining-lr", "1e30")) == 2
    message = capsys.readouterr().err
    assert message.startswith("mlopt: outer step")
    assert "is inf (estimators: finetuning: Identity()" in message or "is nan (estimators: " in message
    assert message.count("\n") == 1
    (fault,) = (case.folder / "infinite" / "checkpoints" / "tapweight").glob("fault-*")
    assert str(fault) in message


ERRORS = {
    "molecules": [
        ("--output train.csv", "output='train.csv' is a file; give a folder"),
        ("--corpus nothing.smi", "nothing.smi: no such file"),
        ("--corpus train.csv.zip", "train.csv.zip: no such file; give the path of a data file"),
        ("--corpus train.doc", "the suffix '.doc' is not one of .csv, .tsv"),
        ("--train nothing.csv", "nothing.csv: no such file"),
        (
            "--labels lenght",
            "train.csv: no column 'lenght'; available: 'smiles', 'length', 'nitrogen' (did you mean 'le",
        ),
        ("--valid train.csv", "--valid is given without --test; give both"),
        ("--dataset ESOL", "give either --train FILE (`train` in [data]) or --dataset NAME"),
        ("--metric roc_auc", "metric='roc_auc' does not fit regression; give 'rmse' or 'mae'"),
        ("--kind classification", "row 2, column 'length': '0.4' is a number, not the name of a class"),
        ("--strict", "corpus.smi, row 41: 'C1CC' is not a molecule"),
        ("--objectives contrastive", "objectives=['contrastive']; give at least two"),
        ("--steps 3 --every 4", "steps=3 at every=4: the weights never move; take at least 4 steps"),
        ("--dropout 1", "--dropout=1.0; it must be a number >= 0 and < 1"),
        (
            "--corpus-limit 15",
            "fingerprint_clusters needs at least 20 molecules, but the corpus has 15; give a larger corpus",
        ),
        ("--config nothing.toml", "nothing.toml: no such file; give the path of a configuration"),
        ("--config train.csv", "train.csv: a configuration is a .toml or a .json file"),
    ],
    "text": [
        ("--model nothing/here", "model='nothing/here' cannot be loaded ("),
        ("--model train.jsonl", "model='train.jsonl' is a file; give the folder that holds it"),
        ("--train nothing.jsonl", "nothing.jsonl: no such file"),
        ("--valid corpus.txt.gz", "the suffix '.txt' is not one of .csv"),
        ("--corpus bad.txt.gz", "bad.txt.gz is not a complete gzip file"),
        ("--label class", "train.jsonl: no column 'class'; available: 'text', 'label'; name the column with --label"),
        (
            "--text body",
            "train.jsonl: no column 'body'; available: 'text', 'label'; name the columns of text with --text",
        ),
        ("--valid other.jsonl", "other.jsonl, row 1, column 'label': 'rude' is not one of the classes, kind, unkind"),
        ("--train empty.jsonl --strict", "empty.jsonl, row 1: the text is empty; correct it"),
        ("--metric pearson", "metric='pearson' does not fit classification"),
        ("--kind regression", "train.jsonl, row 1, column 'label': 'kind' is not a number"),
        ("--dataset cola", "give either --train FILE (`train` in [data]) or --dataset NAME"),
        ("--max-length 33", "max_length=33; the model takes from 3 to 32 tokens"),
        ("--model maskless", "masked_tokens hides tokens behind a mask token, but this tokenizer has none"),
        ("--model larger", "the tokenizer has 36 tokens, but the model embeds 35"),
        ("--steps 2 --every 3", "steps=2 at every=3: the weights never move"),
    ],
}


@pytest.fixture(scope="session")
def spoilt(text: Case) -> None:
    """Write files that a run on text cannot use, a model without a mask token, and one with too large a tokenizer."""
    (text.folder / "bad.txt.gz").write_bytes(b"no gzip")
    (text.folder / "other.jsonl").write_text('{"text": "good", "label": "rude"}\n')
    (text.folder / "empty.jsonl").write_text('{"text": "", "label": "kind"}\n')
    own, maskless = encoder(), text.folder / "maskless"
    own.save(maskless)
    config = load(maskless, "tokenizer_config.json")
    (maskless / "tokenizer_config.json").write_text(json.dumps({**config, "mask_token": None}))
    own.tokenizer.add_tokens(["extra"])
    own.save(text.folder / "larger")


@pytest.mark.usefixtures("spoilt")
@pytest.mark.parametrize(
    ("name", "more", "sentence"), [(name, *error) for name, errors in ERRORS.items() for error in errors]
)
def test_an_error_of_a_user_is_one_sentence(
    name: str, more: str, sentence: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    case = request.getfixturevalue(name)
    request.getfixturevalue("monkeypatch").chdir(case.folder)
    assert cli.main(case.options("refused", *more.split())) == 2
    message = capsys.readouterr().err
    assert message.startswith("mlopt: ")
    assert sentence in message
    assert message.count("\n") == 1
    assert not any((case.folder / "refused").glob("*"))
