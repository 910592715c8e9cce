"""`mlopt tapweight text`: what a run leaves, that it can be repeated, and what it refuses."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import datasets
import pytest
import torch
from text_cases import encoder, laid, sentences
from transformers import AutoModel, AutoTokenizer

from mlopt import cli
from mlopt.recipes.tapweight.configuration import ConfigurationError, parse, read, write
from mlopt.recipes.tapweight.text.modality import Settings
from mlopt.recipes.tapweight.text.modality import TextConfiguration as Configuration
from mlopt.recipes.tapweight.text.objectives import OBJECTIVES

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMAND = ["tapweight", "text"]
SMALL = [
    "--max-length",
    "16",
    "--batch-size",
    "8",
    "--epochs",
    "2",
    "--measurements",
    "2",
    "--device",
    "cpu",
    "--steps",
    "4",
]
FAST = [*SMALL, "--objectives", "masked_tokens", "contrastive", "--methods", "tapweight"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Let torch have one thread: where others compute too, several wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def lines(count: int, seed: int) -> str:
    return "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in sentences(count, seed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny encoder, a corpus, and labelled texts."""
    folder = tmp_path_factory.mktemp("text")
    encoder().save(folder / "model")
    corpus = "\n".join(text for text, _ in sentences(40, 7))
    (folder / "corpus.txt.gz").write_bytes(gzip.compress(corpus.encode()))
    for seed, (split, count) in enumerate((("train", 40), ("dev", 16), ("test", 16))):
        (folder / f"{split}.jsonl").write_text(lines(count, seed))
    return folder


def options(folder: Path, output: str, *more: str, small: list[str] = FAST) -> list[str]:
    files = {"model": "model", "train": "train.jsonl", "valid": "dev.jsonl", "test": "test.jsonl", "output": output}
    given = [part for name, file in files.items() for part in (f"--{name}", str(folder / file))]
    return [*COMMAND, *given, *small, *more]


def succeed(arguments: list[str]) -> None:
    assert cli.main(arguments) == 0


def load(*parts: str | Path) -> Any:
    return json.loads(Path(*parts).read_text())


def same_run(first: Path, second: Path) -> bool:
    names = ("weights.json", "scores.json", "history.csv", "encoder/model.safetensors")
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """Return the output of a run with the default objectives and methods."""
    more = ["--corpus", str(folder / "corpus.txt.gz"), "--seed", "3", "--metric", "macro_f1"]
    succeed(options(folder, "finished", *more, small=SMALL))
    return folder / "finished"


def test_a_run_leaves_its_weights_history_scores_picture_and_encoder(finished: Path, folder: Path) -> None:
    names = [name for name in OBJECTIVES if name != "random_labels"]
    learned = load(finished, "weights.json")
    assert list(learned["weights"]) == list(learned["signals"]) == names
    assert sum(learned["weights"].values()) == pytest.approx(1, abs=1e-6)
    with open(finished / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    scores = load(finished, "scores.json")
    assert scores["metric"] == "macro_f1"
    assert list(scores["scores"]) == ["direct", "equal", "tapweight"]
    assert (finished / "weights.png").read_bytes().startswith(b"\x89PNG")
    assert "transformers" in load(finished, "environment.json")["packages"]
    adapted = AutoModel.from_pretrained(finished / "encoder").state_dict()
    start = AutoModel.from_pretrained(folder / "model").state_dict()
    assert adapted.keys() == start.keys()
    assert not torch.equal(adapted["embeddings.word_embeddings.weight"], start["embeddings.word_embeddings.weight"])
    assert AutoTokenizer.from_pretrained(finished / "encoder")("good")["input_ids"] == [2, 25, 3]
    card = (finished / "encoder" / "README.md").read_text()
    assert learned["verdict"] in card
    assert "- corpus: 40 texts of corpus.txt.gz" in card


def test_a_run_is_repeated_bit_for_bit_from_its_configuration_and_from_any_folder(
    finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    saved = read(finished / "config.json", Configuration)
    assert (saved.seeds, saved.steps, saved.device, saved.data.metric) == ((3,), 4, "cpu", "macro_f1")
    assert saved.settings == Settings(batch_size=8, epochs=2, measurements=2)
    monkeypatch.chdir(tmp_path)
    succeed([*COMMAND, "--config", str(finished / "config.json"), "--output", "again"])
    assert same_run(finished, tmp_path / "again")


def test_several_seeds_are_runs_of_their_own_and_a_summary(folder: Path) -> None:
    """That seed 1 alone gives the same shows that a run leaves nothing to the next, such as targets on the texts."""
    several = folder / "several"
    given = options(folder, "several", "--seeds", "0", "1", "--objectives", "masked_tokens", "random_labels")
    succeed(given)
    names = ["checkpoints", "config.json", "seed-0", "seed-1", "summary.json"]
    assert sorted(path.name for path in several.iterdir()) == names
    assert not same_run(several / "seed-0", several / "seed-1")
    succeed([*COMMAND, "--config", str(several / "seed-1" / "config.json"), "--output", str(folder / "alone")])
    assert same_run(several / "seed-1", folder / "alone")


def test_the_corpus_is_by_default_the_tasks_own_texts_and_one_file_is_split(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(folder)
    done = subprocess.run(
        [sys.executable, "-m", "mlopt", *COMMAND, "--model", "model", "--train", "train.jsonl", *FAST, "--output", "own"],
        capture_output=True, text=True, check=False, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    for told in (
        "texts of train.jsonl.\nTask: classification into kind, unkind, scored by accuracy; texts: 32 train, 4 valid, 4 test.",
        "Note: masked_tokens: the checkpoint has no head for masked tokens; a new one, tied to the embeddings, is trained.",
        "Weights of TapWeight",
        "accuracy (higher is better)",
        load("own", "weights.json")["verdict"],
        "Saved in own.",
    ):
        assert told in done.stdout


def test_a_task_of_glue_by_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    features = {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["unkind", "kind"])}
    columns = {
        "sentence": [text for text, _ in sentences(40)],
        "label": [label == "kind" for _, label in sentences(40)],
    }
    laid(tmp_path, "cola", columns, datasets.Features(features))
    model = ["--model", str(folder / "model"), "--dataset", "cola"]
    succeed([*COMMAND, *model, *FAST, "--output", str(tmp_path / "output")])
    assert load(tmp_path, "output", "scores.json")["metric"] == "matthews"
    card = (tmp_path / "output" / "encoder" / "README.md").read_text()
    assert "train 36, valid 4, test 40" in card
    assert " texts of GLUE cola train\n" in card


def test_what_is_cut_off_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    succeed(options(folder, "cut", "--max-length", "6"))
    told = capsys.readouterr().out
    assert "texts of train.jsonl are longer than 6 tokens and are cut off" in told.splitlines()[0]
    assert "of 16 texts of dev.jsonl are longer than 6 tokens and are cut off" in told


def test_half_precision_eager_attention_recomputation_and_fewer_layers(folder: Path) -> None:
    more = [
        "--dtype",
        "bfloat16",
        "--attention",
        "eager",
        "--gradient-checkpointing",
        "--layers",
        "1",
        "--pooling",
        "cls",
    ]
    succeed(options(folder, "half", *more))
    adapted = AutoModel.from_pretrained(folder / "half" / "encoder", dtype="auto")
    assert adapted.dtype == torch.bfloat16
    assert adapted.config.num_hidden_layers == 1


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("--model nothing/here", "model='nothing/here' cannot be loaded: "),
        ("--model train.jsonl", "model='train.jsonl' is a file; give the folder that holds it"),
        ("--train nothing.jsonl", "nothing.jsonl: no such file"),
        ("--valid corpus.txt.gz", "the suffix '.txt' is not one of .csv"),
        ("--corpus bad.txt.gz", "bad.txt.gz: not a whole gzip file"),
        ("--label class", "train.jsonl, row 1: no column 'class'; there are 'text', 'label'"),
        ("--text body", "train.jsonl, row 1: no column 'body'"),
        ("--valid other.jsonl", "other.jsonl, row 1: the label 'rude' is none of the classes, kind, unkind"),
        ("--train empty.jsonl --strict", "empty.jsonl, row 1: the text is empty; mend it"),
        ("--metric pearson", "metric='pearson' does not fit classification"),
        ("--kind regression", "train.jsonl, row 1: the label 'kind' is not a number"),
        ("--dataset cola", "give either --train FILE (`train` in [data]) or --dataset NAME"),
        ("--max-length 33", "max_length=33; the model takes from 3 to 32 tokens"),
        ("--model maskless", "masked_tokens hides tokens behind a mask token, and this tokenizer has none"),
        ("--model larger", "the tokenizer has 36 tokens, but the model embeds 35"),
        ("--objectives contrastive", "there is something to weigh from two on"),
        ("--steps 3 --every 3", "moves the weights 1 times; at least measurements=2"),
        ("--output train.jsonl", "output='train.jsonl' is a file; give a folder"),
    ],
)
def test_errors_of_a_user_are_one_sentence(
    more: str, sentence: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    (folder / "bad.txt.gz").write_bytes(b"no gzip")
    (folder / "other.jsonl").write_text('{"text": "good", "label": "rude"}\n')
    (folder / "empty.jsonl").write_text('{"text": "", "label": "kind"}\n')
    spoil(folder)
    assert cli.main(options(folder, "refused", *more.split())) == 2
    told = capsys.readouterr().err
    assert told.startswith("mlopt: ")
    assert sentence in told
    assert told.count("\n") == 1
    assert not any((folder / "refused").glob("*"))


def test_a_run_that_is_not_finite_says_where_and_a_finished_one_is_read_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(options(folder, "infinite", "--pretraining-lr", "1e30")) == 2
    told = capsys.readouterr().err
    assert "mlopt: outer step" in told
    assert "fault-" in told
    assert told.count("\n") == 1
    succeed(options(folder, "twice"))
    before = (folder / "twice" / "weights.json").read_bytes()
    succeed(options(folder, "twice", "--resume"))
    assert (folder / "twice" / "weights.json").read_bytes() == before


def spoil(folder: Path) -> None:
    """Lay a model whose tokenizer has no mask token, and one whose tokenizer is too large."""
    if not (folder / "larger").exists():
        own = encoder()
        own.save(folder / "maskless")
        config = load(folder, "maskless", "tokenizer_config.json")
        (folder / "maskless" / "tokenizer_config.json").write_text(json.dumps({**config, "mask_token": None}))
        own.tokenizer.add_tokens(["extra"])
        own.save(folder / "larger")


@pytest.mark.parametrize("missing", ["train", "output", "model"])
def test_what_is_needed_is_asked_for(missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"model": "a", "train": "a.csv", "output": "a"}
    assert cli.main([*COMMAND, *(f"--{name}={value}" for name, value in given.items() if name != missing)]) == 2
    assert f"--{missing}" in capsys.readouterr().err


def test_valid_and_test_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*COMMAND, "--model=a", "--train=a.csv", "--output=a", "--valid=b.csv"]) == 2
    assert "--valid is given without --test; give both, or neither" in capsys.readouterr().err
    assert cli.main([*COMMAND, "--model=a", "--dataset=cola", "--output=a", "--text=b"]) == 2
    assert "--text goes with --train; a data set that is named has its own" in capsys.readouterr().err


def test_a_configuration_is_written_and_read_and_its_missing_keys_are_the_texts_defaults(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('seeds = [4]\n[settings]\ngamma = 2\n[encoder]\nmodel = "x"\nlayers = 2\n')
    given = read(tmp_path / "a.toml", Configuration)
    assert given.settings == Settings(gamma=2.0)
    assert given.settings.batch_size == 16
    assert (given.encoder.model, given.encoder.layers, given.seeds) == ("x", 2, (4,))
    write(given, tmp_path / "b.json")
    assert read(tmp_path / "b.json", Configuration) == given
    line = parse(["--config", str(tmp_path / "a.toml"), "--gamma", "3"], Configuration, prog="x", description="").run
    assert (line.settings.gamma, line.encoder.layers) == (3.0, 2)
    assert attrs.asdict(Configuration())["data"]["corpus"] is None
    (tmp_path / "a.toml").write_text("[settings]\nmax_length = 3\n")
    with pytest.raises(
        ConfigurationError, match=r"settings has no key 'max_length'; did you mean 'encoder\.max_length'"
    ):
        read(tmp_path / "a.toml", Configuration)
