"""`mlopt tapweight molecules`: saved encoders, replaced results, interrupted runs, and configurations."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import os
import re
import signal
from pathlib import Path

import attrs
import datasets
import pytest
import torch
from command_cases import SMILES, Case, load, output_of_process, same_run, succeed

from mlopt import cli
from mlopt.recipes.tapweight import configuration as reader
from mlopt.recipes.tapweight.command_line import parse
from mlopt.recipes.tapweight.configuration import ConfigurationError, write
from mlopt.recipes.tapweight.molecules.encoder import GINE
from mlopt.recipes.tapweight.molecules.modality import Data, EncoderSettings
from mlopt.recipes.tapweight.molecules.modality import MoleculeConfiguration as Configuration
from mlopt.recipes.tapweight.settings import Settings
from mlopt.solving.engine import Engine

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_saved_encoder_loads_and_was_trained(molecules: Case, tmp_path: Path) -> None:
    finished = molecules.finished()
    encoder = GINE.load(finished / "encoder")
    assert encoder.config == attrs.asdict(EncoderSettings(width=8, layers=2))
    encoder.save(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (finished / "encoder" / "model.safetensors").read_bytes()
    torch.manual_seed(3)
    start = GINE(width=8, layers=2)
    assert not torch.equal(start.atoms.tables[0].weight, encoder.atoms.tables[0].weight)
    assert len({score["test"] for score in load(finished, "scores.json")["scores"].values()}) == 4


def test_a_result_is_replaced_only_with_overwrite(molecules: Case, capsys: pytest.CaptureFixture[str]) -> None:
    output = molecules.run("replaced", "--seeds", "0", "1")
    (output / "notes.txt").write_text("mine")
    before = (output / "summary.json").read_bytes()
    assert cli.main(molecules.options("replaced")) == 2
    assert "already holds a result (config.json); give another --output, or --overwrite" in capsys.readouterr().err
    assert (output / "summary.json").read_bytes() == before
    molecules.run("replaced", "--overwrite")
    results = [f"{name}.json" for name in ("config", "environment", "scores", "splits", "weights")]
    results += ["history.csv", "predictions.csv", "skipped.csv", "weights.png"]
    assert {path.name for path in output.iterdir()} == {"checkpoints", "encoder", "model", "notes.txt", *results}


def test_a_failed_run_keeps_the_old_result(molecules: Case) -> None:
    weights = molecules.run("kept") / "weights.json"
    before = weights.read_bytes()
    assert cli.main(molecules.options("kept", "--overwrite", "--pretraining-lr", "1e30")) == 2
    assert weights.read_bytes() == before


def test_three_files_of_classes_and_a_gzipped_corpus_in_a_process_of_its_own(molecules: Case, tmp_path: Path) -> None:
    corpus = "\n".join(["Name,SMILES", *(f"m,{smiles}" for smiles in SMILES)])
    (tmp_path / "corpus.csv.gz").write_bytes(gzip.compress(corpus.encode()))
    lines = (molecules.folder / "train.csv").read_text().splitlines()
    for name, part in (("train", lines[1::2]), ("valid", [*lines[2::4], "xx,1,1"]), ("test", lines[4::4])):
        (tmp_path / f"{name}.csv").write_text("\n".join([lines[0], *part]) + "\n")
    files = "--corpus corpus.csv.gz --corpus-limit 25 --train train.csv --valid valid.csv --test test.csv"
    more = f"{files} {molecules.fast.replace('--split random', '')} --labels nitrogen --output output --freeze-encoder --seed 1"
    printed = output_of_process([*molecules.command, *more.split()], tmp_path)
    for sentence in (
        "Corpus: 25 molecules of corpus.csv.gz.\nTask: classification of nitrogen, scored by roc_auc;",
        "molecules: 20 train, 10 valid, 10 test.",
        "Note: 10 molecules of valid.csv; 1 skipped: row 12 (not valid SMILES).",
        "Note: fingerprint_clusters: 1000 clusters reduced to 2",
        "Weights of TapWeight",
        "roc_auc (higher is better)",
        load(tmp_path, "output", "weights.json")["verdict"],
        "Saved in output.",
    ):
        assert sentence in printed
    assert list(load(tmp_path, "output", "scores.json")["scores"]) == ["tapweight"]
    assert read(tmp_path / "output" / "config.json").data.valid == tmp_path / "valid.csv"


def test_a_data_set_of_molecule_net(molecules: Case, tmp_path: Path) -> None:
    raw = tmp_path / "esol" / "raw" / "delaney-processed.csv"
    raw.parent.mkdir(parents=True)
    names = ",".join(f"column{k}" for k in range(8))
    rows = [f"{',' * 7},{len(smiles)},{smiles}" for smiles in SMILES]
    raw.write_text("\n".join([f"{names},measured log solubility in mols per litre,smiles", *rows]) + "\n")
    files = f"--corpus {molecules.folder / 'corpus.smi'} --dataset ESOL --root {tmp_path} --output {tmp_path / 'net'}"
    succeed([*molecules.command, *files.split(), *molecules.fast.split(), "--metric", "mae"])
    assert load(tmp_path, "net", "scores.json")["metric"] == "mae"
    # The split of that run, and one that leaves rows out.
    split = load(tmp_path, "net", "splits.json")
    (tmp_path / "own.json").write_text(json.dumps({**split, "test": split["test"][1:]}))
    for name, listed in (("net", split), ("own", {**split, "test": split["test"][1:]})):
        file = tmp_path / "net" / "splits.json" if name == "net" else tmp_path / "own.json"
        again = f"{files}-{name} --splits {file} --seed 5"
        succeed([*molecules.command, *again.split(), *molecules.fast.replace("--split random", "").split()])
        assert load(tmp_path, f"net-{name}", "splits.json") == listed


def test_a_folder_with_a_data_set_for_each_split(
    molecules: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {"validation": SMILES[:6], "train": SMILES[6:30], "test": SMILES[30:], "more": SMILES[:2]}
    made = {
        name: datasets.Dataset.from_dict({"smiles": own, "length": [len(x) / 10 for x in own]})
        for name, own in parts.items()
    }
    datasets.DatasetDict(made).save_to_disk(str(tmp_path / "data"))
    options = f"--corpus {molecules.folder / 'corpus.smi'} --train {tmp_path / 'data'} --output {tmp_path / 'run'}"
    command = [*molecules.command, *options.split(), *molecules.fast.replace("--split random", "").split()]
    succeed(command)
    stated = f"Splits: train, validation, test of {tmp_path / 'data'}; not read: more."
    assert stated in " ".join(capsys.readouterr().out.split())
    with (tmp_path / "run" / "predictions.csv").open() as stream:
        assert [row["smiles"] for row in csv.DictReader(stream)] == SMILES[30:]
    assert cli.main([*command, "--overwrite", "--split-column", "length"]) == 2
    message = capsys.readouterr().err
    assert (
        "--split-column has no effect on a folder --train with a data set for each split; leave it out, or give one of its data "
        "sets as --train" in message
    )
    assert cli.main([*molecules.command, *options.replace("--train", "--dataset").split(), "--overwrite"]) == 2
    assert "is a folder, not a MoleculeNet data set; give it with --train" in capsys.readouterr().err


def interrupted_at(step: int, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command that receives SIGTERM during an outer step, counted over all phases."""
    taken, real = itertools.count(1), Engine.step

    def interrupting(engine: Engine) -> None:
        if next(taken) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        real(engine)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", interrupting)
        with pytest.raises(SystemExit) as status:
            cli.main(arguments)
    assert status.value.code == 0


@pytest.mark.parametrize("step", [2, 5, 9])
def test_an_interrupted_run_is_resumed(
    step: int, molecules: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cut, more = f"cut-{step}", ("--methods", "direct", "equal", "tapweight", "--checkpoint-every", "3")
    whole = molecules.run(f"whole-{step}", *more)
    interrupted_at(step, molecules.options(cut, *more), monkeypatch)
    assert re.search(r"mlopt: SIGTERM: step \d+ of \d+ is finished and saved in", capsys.readouterr().err)
    for refused, sentence in (
        ([], "holds an unfinished run; resume it with --resume"),
        (["--resume", "--every", "2"], "has settings.every=1, not 2; resume with the same configuration"),
        (["--resume", "--overwrite"], "--overwrite and --resume cannot be combined"),
    ):
        assert cli.main(molecules.options(cut, *more, *refused)) == 2
        assert sentence in capsys.readouterr().err
    for _ in range(2):  # the second time, a finished run is read again
        output = molecules.run(cut, *more, "--resume")
        assert same_run(whole, output)
    # With --overwrite the run starts again. The old result goes when the new one comes, also after an interruption.
    (output / "summary.json").write_text("of an older run")
    interrupted_at(step, molecules.options(cut, *more, "--overwrite"), monkeypatch)
    assert (output / "summary.json").is_file()
    assert same_run(whole, molecules.run(cut, *more, "--resume"))
    assert not (output / "summary.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_refused(molecules: Case, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(molecules.options("gpu", "--device", "cuda")) == 2
    assert "PyTorch finds no GPU here; give 'cpu' or 'auto'" in capsys.readouterr().err


def read(file: Path) -> Configuration:
    return reader.read(file, Configuration)


def written(folder: Path, text: str, suffix: str) -> Path:
    file = folder / f"run{suffix}"
    file.write_text(text)
    return file


def test_toml_and_json_are_equivalent_and_the_command_line_overrides_them(tmp_path: Path) -> None:
    toml = written(
        tmp_path, 'seeds = [4]\n[data]\ncorpus = "a.smi"\nstrict = true\n[settings]\ngamma = 2\nevery = 3\n', ".toml"
    )
    content = {"seeds": [4], "data": {"corpus": "a.smi", "strict": True}, "settings": {"gamma": 2, "every": 3}}
    expected = Configuration(
        seeds=(4,), data=Data(corpus=Path("a.smi"), strict=True), settings=Settings(gamma=2.0, every=3)
    )
    assert read(toml) == read(written(tmp_path, json.dumps(content), ".json")) == expected
    line = ["--gamma", "0.5", "--config", str(toml), "--no-strict", "--seeds", "1", "2"]
    run = parse(line, Configuration, prog="mlopt", description="").run
    assert (run.settings.gamma, run.settings.every, run.data.strict, run.seeds) == (0.5, 3, False, (1, 2))
    assert run.data.corpus == Path("a.smi")


def test_a_configuration_that_is_written_reads_as_itself(tmp_path: Path) -> None:
    data = Data(corpus=Path("a b.smi"), labels=("x", "ü"), kind="regression", corpus_limit=7)
    configuration = Configuration(output=Path("o"), data=data, methods=("equal",), encoder=EncoderSettings(dropout=0.1))
    write(configuration, tmp_path / "config.json")
    assert read(tmp_path / "config.json") == configuration


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[settings]\ngama = 1", "settings has no key 'gama'; did you mean 'gamma'?"),
        ("gamma = 1", "the configuration has no key 'gamma'; did you mean 'settings.gamma'?"),
        ("seed = [1]", "the configuration has no key 'seed'; did you mean 'seeds'?"),
        ("[encoder]\nqqq = 1", "encoder has no key 'qqq'; it has width, layers, dropout, norm, pooling, residual"),
        ("overwrite = true", "the configuration has no key 'overwrite'"),
        ("[data]\na = 1\nb = 1\nc = 1\nd = 1\ne = 1", "; data has no key 'b'"),
        ("[data]\na = 1\nb = 1\nc = 1\nd = 1\ne = 1", "; and 2 more"),
        ("[settings]\nevery = '4'", "settings.every='4'; it must be a whole number"),
        ("steps = 4.0", "steps=4.0; it must be a whole number"),
        ("steps = true", "steps=True; it must be a whole number"),
        ("seeds = 4", "seeds=4; it must be a list"),
        ("seeds = [4, 'a']", "seeds[1]='a'; it must be a whole number"),
        ("data = 'train.csv'", "data='train.csv'; it must be a table of keys"),
        ("[data]\nlabels = 'solubility'", "data.labels='solubility'; it must be a list"),
        ("[data]\nstrict = 'no'", "data.strict='no'; it must be true or false"),
        ("[data]\ncorpus = 3", "data.corpus=3; it must be a path, as text"),
        (
            "[data]\nsplit = 'scafold'",
            "data.split='scafold'; it must be one of 'scaffold', 'balanced', 'random', 'stratified'",
        ),
        ("[settings]\ngamma = -1", "gamma=-1.0; it must be a finite number > 0"),
        ("[settings]\ngamma = nan", "gamma=nan; it must be a finite number > 0"),
        ("steps = 4\nsteps = 5", "not valid TOML (Cannot overwrite a value"),
        ("steps = 'a'\ndevice = 'tpu'", "steps='a'; it must be a whole number; device='tpu'; it must be one of 'auto'"),
    ],
)
def test_a_wrong_configuration_is_refused_with_its_place(text: str, sentence: str, tmp_path: Path) -> None:
    file = written(tmp_path, text, ".toml")
    with pytest.raises(ConfigurationError) as error:
        read(file)
    assert str(error.value).startswith(f"{file}: ")
    assert sentence in str(error.value)
