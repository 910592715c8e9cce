"""`mlopt tapweight text`: saved encoders, default corpora, GLUE, and configurations."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import datasets
import pytest
import torch
from command_cases import Case, load, output_of_process, succeed
from text_cases import sentences, write_glue
from transformers import AutoModel, AutoTokenizer

from mlopt import cli
from mlopt.recipes.tapweight.command_line import parse
from mlopt.recipes.tapweight.configuration import ConfigurationError, read, write
from mlopt.recipes.tapweight.text.modality import Settings
from mlopt.recipes.tapweight.text.modality import TextConfiguration as Configuration

pytestmark = pytest.mark.usefixtures("one_thread")
COMMAND = ["tapweight", "text"]


def test_the_saved_encoder_loads_and_was_trained(text: Case) -> None:
    finished = text.finished()
    adapted = AutoModel.from_pretrained(finished / "encoder").state_dict()
    start = AutoModel.from_pretrained(text.folder / "model").state_dict()
    assert adapted.keys() == start.keys()
    assert not torch.equal(adapted["embeddings.word_embeddings.weight"], start["embeddings.word_embeddings.weight"])
    assert AutoTokenizer.from_pretrained(finished / "encoder")("good")["input_ids"] == [2, 25, 3]
    card = (finished / "encoder" / "README.md").read_text()
    assert load(finished, "weights.json")["verdict"] in card
    assert "- corpus: 40 texts of corpus.txt.gz" in card


def test_by_default_the_corpus_is_the_tasks_own_texts_and_one_file_is_split(text: Case, tmp_path: Path) -> None:
    output = tmp_path / "own"
    files = f"--model model --train train.jsonl --output {output}"
    printed = output_of_process([*COMMAND, *files.split(), *text.fast.split()], text.folder)
    for sentence in (
        "texts of train.jsonl.\nTask: classification into kind, unkind, scored by accuracy; texts: 32 train, 4 valid, 4 test.",
        "Note: masked_tokens: the checkpoint has no head for masked tokens; a new one, tied to the embeddings, is trained.",
        "Weights of TapWeight",
        "accuracy (higher is better)",
        load(output, "weights.json")["verdict"],
        f"Saved in {output}.",
    ):
        assert sentence in printed


def test_numbers_of_the_whole_file_stay_numbers_if_those_of_a_split_are_whole(text: Case, tmp_path: Path) -> None:
    parts = ["train"] * 30 + ["valid"] * 5 + ["test"] * 5
    rows = [{"text": own, "label": k % 6, "part": parts[k]} for k, (own, _) in enumerate(sentences(40))]
    rows[37]["label"] = 2.5
    file = tmp_path / "scores.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = f"--model {text.folder / 'model'} --train {file} --split-column part {text.fast} --output {tmp_path / 'run'}"
    succeed([*COMMAND, *more.split()])
    assert load(tmp_path, "run", "scores.json")["metric"] == "pearson"


def test_a_task_of_glue_by_its_name(text: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    features = {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["unkind", "kind"])}
    rows = sentences(40)
    columns = {"sentence": [sentence for sentence, _ in rows], "label": [label == "kind" for _, label in rows]}
    write_glue(tmp_path, "cola", columns, datasets.Features(features))
    output = tmp_path / "output"
    more = f"--model {text.folder / 'model'} --dataset cola {text.fast} --output {output}"
    succeed([*COMMAND, *more.split()])
    assert load(output, "scores.json")["metric"] == "matthews"
    card = (output / "encoder" / "README.md").read_text()
    assert "train 36, valid 4, test 40" in card
    assert " texts of GLUE cola train\n" in card


def test_a_folder_with_a_data_set_for_each_split(
    text: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {"train": sentences(24, 0), "dev": sentences(8, 1), "test": sentences(9, 2)}
    made = {
        name: datasets.Dataset.from_dict({"text": [t for t, _ in rows], "label": [y for _, y in rows]})
        for name, rows in parts.items()
    }
    datasets.DatasetDict(made).save_to_disk(str(tmp_path / "data"))
    more = f"--model {text.folder / 'model'} --train {tmp_path / 'data'} {text.fast} --output {tmp_path / 'run'}"
    succeed([*COMMAND, *more.split()])
    assert "texts: 24 train, 8 valid, 9 test" in " ".join(capsys.readouterr().out.split())
    rows = (tmp_path / "run" / "predictions.csv").read_text().splitlines()[1:]
    assert [row.split(",")[1] for row in rows] == [own for own, _ in parts["test"]]
    assert cli.main([*COMMAND, "--model=a", "--dataset=cola", "--output=a", "--splits=b"]) == 2
    assert (
        "--splits has no effect on the data set of --dataset, which has its own; leave it out, or give --train"
        in capsys.readouterr().err
    )


def test_truncated_texts_are_reported(text: Case, capsys: pytest.CaptureFixture[str]) -> None:
    text.run("cut", "--max-length", "6")
    printed = capsys.readouterr().out
    assert "documents are longer than 6 tokens and are divided" in printed.splitlines()[0]
    assert "of 16 texts of dev.jsonl are longer than 6 tokens and are cut off" in printed


def test_half_precision_eager_attention_recomputation_and_fewer_layers(text: Case) -> None:
    more = "--dtype bfloat16 --attention eager --gradient-checkpointing --layers 1 --pooling cls"
    adapted = AutoModel.from_pretrained(text.run("half", *more.split()) / "encoder", dtype="auto")
    assert adapted.dtype == torch.bfloat16
    assert adapted.config.num_hidden_layers == 1


def test_objectives_on_documents_need_sentences(text: Case, capsys: pytest.CaptureFixture[str]) -> None:
    labelled = [text for text, _ in sentences(40, 7)]
    documents = [". ".join(map(str.capitalize, labelled[k : k + 4])) for k in range(0, 40, 4)]
    corpus = text.folder / "documents.txt"
    corpus.write_text("\n".join(documents))
    more = f"--corpus {corpus} --objectives sentence_position same_document".split()
    run = text.run("sentences", "--sentences", *more)
    assert "Corpus: 40 sentences of documents.txt" in capsys.readouterr().out
    assert "- corpus: 40 sentences of documents.txt" in (run / "encoder" / "README.md").read_text()
    assert cli.main(text.options("documents", *more)) != 0
    assert "sentence_position needs sentences with their places" in capsys.readouterr().err


def test_the_default_objectives_need_no_more_than_texts() -> None:
    default = Configuration().objectives
    assert default == ("masked_tokens", "contrastive", "sentence_order", "replaced_tokens")


@pytest.mark.parametrize("missing", ["train", "output", "model"])
def test_a_missing_required_option_is_named(missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"model": "a", "train": "a.csv", "output": "a"}
    assert cli.main([*COMMAND, *(f"--{name}={value}" for name, value in options.items() if name != missing)]) == 2
    assert f"--{missing}" in capsys.readouterr().err


def test_valid_and_test_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*COMMAND, "--model=a", "--train=a.csv", "--output=a", "--valid=b.csv"]) == 2
    assert "--valid is given without --test; give both, or neither" in capsys.readouterr().err
    for option in ("text", "labels"):
        assert cli.main([*COMMAND, "--model=a", "--dataset=cola", "--output=a", f"--{option}=b"]) == 2
        assert f"--{option} has no effect on the data set of --dataset, which has its own" in capsys.readouterr().err


def test_missing_keys_of_a_configuration_are_the_defaults_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('seeds = [4]\n[settings]\ngamma = 2\n[encoder]\nmodel = "x"\nlayers = 2\n')
    configuration = read(tmp_path / "a.toml", Configuration)
    assert configuration.settings == Settings(gamma=2.0)
    assert configuration.settings.batch_size == 16
    assert (configuration.encoder.model, configuration.encoder.layers, configuration.seeds) == ("x", 2, (4,))
    write(configuration, tmp_path / "b.json")
    assert read(tmp_path / "b.json", Configuration) == configuration
    line = parse(["--config", str(tmp_path / "a.toml"), "--gamma", "3"], Configuration, prog="x", description="").run
    assert (line.settings.gamma, line.encoder.layers) == (3.0, 2)
    assert attrs.asdict(Configuration())["data"]["corpus"] is None
    (tmp_path / "a.toml").write_text("[settings]\nmax_length = 3\n")
    with pytest.raises(
        ConfigurationError, match=r"settings has no key 'max_length'; did you mean 'encoder\.max_length'"
    ):
        read(tmp_path / "a.toml", Configuration)
