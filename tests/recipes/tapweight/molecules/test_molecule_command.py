"""`mlopt tapweight molecules`: what a run leaves, that it can be repeated, and what it refuses."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlopt import cli
from mlopt.recipes.tapweight import configuration as reader
from mlopt.recipes.tapweight.configuration import ConfigurationError, write
from mlopt.recipes.tapweight.molecules.encoder import GINE
from mlopt.recipes.tapweight.molecules.modality import Data, EncoderSettings
from mlopt.recipes.tapweight.molecules.modality import MoleculeConfiguration as Configuration
from mlopt.recipes.tapweight.molecules.objectives import OBJECTIVES
from mlopt.recipes.tapweight.settings import Settings
from mlopt.solving.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMAND = ["tapweight", "molecules"]
#: 40 molecules of different rings, chains and groups.
SMILES = [
    start + "C" * length + end
    for start, length, end in itertools.product(
        ("CC", "c1ccccc1", "N#C", "C1CCNC1", "OC(=O)"), (1, 3), ("O", "Cl", "N", "Br")
    )
]
SMALL = [
    "--width",
    "8",
    "--layers",
    "2",
    "--epochs",
    "2",
    "--measurements",
    "2",
    "--split",
    "random",
    "--device",
    "cpu",
]
FAST = [*SMALL, "--steps", "4", "--objectives", "masked_atoms", "fingerprint_clusters", "--methods", "tapweight"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Let torch have one thread: where others compute too, several wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a corpus of 40 molecules and a table of their lengths."""
    folder = tmp_path_factory.mktemp("molecules")
    (folder / "corpus.smi").write_text("\n".join([*SMILES, "C1CC no ring"]) + "\n")
    rows = [f"{smiles},{len(smiles) / 10},{int('N' in smiles)}" for smiles in SMILES]
    (folder / "train.csv").write_text("\n".join(["smiles,length,nitrogen", *rows]) + "\n")
    return folder


def options(folder: Path, output: str, *more: str, small: list[str] = FAST) -> list[str]:
    files = ["--corpus", str(folder / "corpus.smi"), "--train", str(folder / "train.csv"), "--labels", "length"]
    return [*COMMAND, *files, *small, "--output", str(folder / output), *more]


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
    succeed(options(folder, "finished", "--steps", "6", "--every", "2", "--seed", "3", small=SMALL))
    return folder / "finished"


@pytest.fixture(scope="module")
def several(folder: Path) -> Path:
    """Return the output of runs with two seeds."""
    succeed(options(folder, "several", "--seeds", "0", "1"))
    return folder / "several"


def test_a_run_leaves_its_weights_history_scores_and_picture(finished: Path) -> None:
    learned = load(finished, "weights.json")
    names = [name for name in OBJECTIVES if name != "random_labels"]
    assert list(learned["weights"]) == list(learned["signals"]) == names
    assert sum(learned["weights"].values()) == pytest.approx(1, abs=1e-6)
    assert learned["verdict"].endswith(".")
    with open(finished / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3"]  # six steps, the weights moving at every second
    for row in rows:
        assert sum(float(row[f"reweighting/weight/{name}"]) for name in names) == pytest.approx(1, abs=1e-6)
        assert all(float(row[f"{level}/loss"]) > 0 for level in ("pretraining", "finetuning", "reweighting"))
    scores = load(finished, "scores.json")
    assert scores["metric"] == "rmse"
    assert list(scores["scores"]) == ["direct", "equal", "tapweight"]
    assert all(0 < score[split] < 10 for score in scores["scores"].values() for split in ("valid", "test"))
    assert len({score["test"] for score in scores["scores"].values()}) == 3
    assert (finished / "weights.png").read_bytes().startswith(b"\x89PNG")
    assert "torch" in load(finished, "environment.json")["packages"]


def test_the_saved_encoder_loads_and_was_trained(finished: Path, tmp_path: Path) -> None:
    encoder = GINE.load(finished / "encoder")
    assert encoder.config == attrs.asdict(EncoderSettings(width=8, layers=2))
    encoder.save(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (finished / "encoder" / "model.safetensors").read_bytes()
    torch.manual_seed(3)
    start = GINE(width=8, layers=2)
    assert not torch.equal(start.atoms.tables[0].weight, encoder.atoms.tables[0].weight)


def test_the_saved_configuration_is_the_whole_run(finished: Path) -> None:
    configuration = read(finished / "config.json")
    assert (configuration.output, configuration.data.train) == (finished, finished.parent / "train.csv")
    assert (configuration.seeds, configuration.steps, configuration.device) == ((3,), 6, "cpu")
    assert configuration.settings == Settings(every=2, epochs=2, measurements=2)


def test_a_run_is_repeated_bit_for_bit_from_its_configuration_and_from_any_folder(
    finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    succeed([*COMMAND, "--config", str(finished / "config.json"), "--output", "again"])
    assert same_run(finished, tmp_path / "again")


def test_several_seeds_are_runs_of_their_own_and_a_summary(several: Path, folder: Path) -> None:
    """That seed 1 alone gives the same shows that a run leaves nothing to the next, such as targets on the graphs."""
    assert sorted(path.name for path in several.iterdir()) == [
        "checkpoints",
        "config.json",
        "seed-0",
        "seed-1",
        "summary.json",
    ]
    assert read(several / "config.json").seeds == (0, 1)
    assert not same_run(several / "seed-0", several / "seed-1")
    succeed([*COMMAND, "--config", str(several / "seed-1" / "config.json"), "--output", str(folder / "alone")])
    assert same_run(several / "seed-1", folder / "alone")
    summary = load(several, "summary.json")
    weights = [load(several, seed, "weights.json")["weights"]["masked_atoms"] for seed in ("seed-0", "seed-1")]
    tests = [load(several, seed, "scores.json")["scores"]["tapweight"]["test"] for seed in ("seed-0", "seed-1")]
    for spread, values in (
        (summary["weights"]["masked_atoms"], weights),
        (summary["scores"]["tapweight"]["test"], tests),
    ):
        assert spread["mean"] == pytest.approx(statistics.fmean(values))
        assert spread["std"] == pytest.approx(statistics.stdev(values))


def test_a_result_is_replaced_only_when_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    succeed(options(folder, "replaced", "--seeds", "0", "1"))
    (folder / "replaced" / "notes.txt").write_text("mine")
    before = (folder / "replaced" / "summary.json").read_bytes()
    assert cli.main(options(folder, "replaced")) == 2
    assert "already holds a result (config.json); give another --output, or --overwrite" in capsys.readouterr().err
    assert (folder / "replaced" / "summary.json").read_bytes() == before
    succeed(options(folder, "replaced", "--overwrite"))
    names = [
        "checkpoints",
        "config.json",
        "encoder",
        "environment.json",
        "history.csv",
        "notes.txt",
        "scores.json",
        "weights.json",
        "weights.png",
    ]
    assert sorted(path.name for path in (folder / "replaced").iterdir()) == sorted(names)


def test_a_failed_run_leaves_the_old_result(folder: Path) -> None:
    succeed(options(folder, "kept"))
    before = (folder / "kept" / "weights.json").read_bytes()
    assert cli.main(options(folder, "kept", "--overwrite", "--pretraining-lr", "1e30")) == 2
    assert (folder / "kept" / "weights.json").read_bytes() == before


def test_three_files_of_classes_and_a_gzipped_corpus_in_a_process_of_its_own(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus.csv.gz").write_bytes(
        gzip.compress("\n".join(["Name,SMILES", *(f"m,{s}" for s in SMILES)]).encode())
    )
    lines = (folder / "train.csv").read_text().splitlines()
    for name, part in (("train", lines[1::2]), ("valid", [*lines[2::4], "xx,1,1"]), ("test", lines[4::4])):
        (tmp_path / f"{name}.csv").write_text("\n".join([lines[0], *part]) + "\n")
    files = "--corpus corpus.csv.gz --corpus-limit 25 --train train.csv --valid valid.csv --test test.csv"
    rest = "--labels nitrogen --output output --freeze-encoder --seed 1"
    done = subprocess.run(
        [sys.executable, "-m", "mlopt", *COMMAND, *files.split(), *FAST, *rest.split()],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(
        "Corpus: 25 molecules of corpus.csv.gz.\nTask: classification of nitrogen, scored by roc_auc;"
    )
    for told in (
        "molecules: 20 train, 10 valid, 10 test.",
        "Note: 10 molecules of valid.csv; 1 skipped: row 12 (not valid SMILES).",
        "Note: fingerprint_clusters: 1000 clusters reduced to 2",
        "Weights of TapWeight",
        "roc_auc (higher is better)",
        load(tmp_path, "output", "weights.json")["verdict"],
        "Saved in output.",
    ):
        assert told in done.stdout
    assert list(load(tmp_path, "output", "scores.json")["scores"]) == ["tapweight"]
    assert read(tmp_path / "output" / "config.json").data.valid == tmp_path / "valid.csv"


def test_a_data_set_of_molecule_net(folder: Path) -> None:
    raw = folder / "nets" / "esol" / "raw" / "delaney-processed.csv"
    raw.parent.mkdir(parents=True)
    names = ",".join(f"column{k}" for k in range(8))
    rows = [f"{',' * 7},{len(smiles)},{smiles}" for smiles in SMILES]
    raw.write_text("\n".join([f"{names},measured log solubility in mols per litre,smiles", *rows]) + "\n")
    files = ["--corpus", str(folder / "corpus.smi"), "--dataset", "ESOL", "--root", str(folder / "nets")]
    succeed([*COMMAND, *files, *FAST, "--metric", "mae", "--output", str(folder / "net")])
    assert load(folder, "net", "scores.json")["metric"] == "mae"


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("--output train.csv", "output='train.csv' is a file; give a folder"),
        ("--corpus nothing.smi", "nothing.smi: no such file"),
        ("--corpus train.csv.zip", "the suffix '.zip' is not one of .csv"),
        ("--train nothing.csv", "nothing.csv: no such file"),
        (
            "--labels lenght",
            "train.csv: no column 'lenght'; there are 'smiles', 'length', 'nitrogen' - did you mean 'length'?",
        ),
        ("--valid train.csv", "--valid is given without --test; give both"),
        ("--dataset ESOL", "give either --train FILE (`train` in [data]) or --dataset NAME"),
        ("--metric roc_auc", "metric='roc_auc' does not fit regression; give 'rmse' or 'mae'"),
        ("--kind classification", "the label 0.4 of task 'length' is not 0 or 1"),
        ("--strict", "corpus.smi, row 41: 'C1CC' is no molecule"),
        ("--objectives contrastive", "objectives=['contrastive']; there is something to weigh from two on"),
        ("--steps 7 --every 4", "moves the weights 1 times; at least measurements=2 are needed"),
        ("--dropout 1", "dropout must be at least 0 and below 1; got 1.0"),
        ("--corpus-limit 15", "fingerprint_clusters needs at least 20 molecules; the corpus has 15"),
        ("--config nothing.toml", "nothing.toml: no such file; give the path of a configuration"),
        ("--config train.csv", "train.csv: a configuration is a .toml or a .json file"),
    ],
)
def test_errors_of_a_user_are_one_sentence(
    more: str, sentence: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert cli.main(options(folder, "refused", *more.split())) == 2
    told = capsys.readouterr().err
    assert told.startswith("mlopt: ")
    assert sentence in told
    assert told.count("\n") == 1
    assert not any((folder / "refused").glob("*"))


def test_a_run_that_is_not_finite_says_where_and_leaves_its_state(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(options(folder, "infinite", "--pretraining-lr", "1e30")) == 2
    told = capsys.readouterr().err
    assert "the loss of level 'finetuning' is inf (estimators: finetuning: Identity()" in told
    assert told.count("\n") == 1
    (fault,) = (folder / "infinite" / "checkpoints" / "tapweight").glob("fault-*")
    assert str(fault) in told


def interrupted_at(step: int, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let SIGTERM come during an outer step, counted over all phases."""
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
def test_an_interrupted_run_is_gone_on_with(
    step: int, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = f"whole-{step}", f"cut-{step}"
    more = ("--methods", "direct", "equal", "tapweight", "--checkpoint-every", "3")
    succeed(options(folder, whole, *more))
    interrupted_at(step, options(folder, cut, *more), monkeypatch)
    assert re.search(r"mlopt: SIGTERM: step \d+ of \d+ is finished and saved in", capsys.readouterr().err)
    assert cli.main(options(folder, cut, *more)) == 2
    assert "holds an unfinished run; resume it with --resume" in capsys.readouterr().err
    assert cli.main(options(folder, cut, *more, "--resume", "--every", "2")) == 2
    assert "has settings.every=1, not 2; resume with the same configuration" in capsys.readouterr().err
    assert cli.main(options(folder, cut, *more, "--resume", "--overwrite")) == 2
    assert "--overwrite and --resume do not go together" in capsys.readouterr().err
    succeed(options(folder, cut, *more, "--resume"))
    assert same_run(folder / whole, folder / cut)
    # A finished run is read again, and begun anew where that is asked for; then what it replaces goes with the new result, also
    # where the run was interrupted in between.
    succeed(options(folder, cut, *more, "--resume"))
    assert same_run(folder / whole, folder / cut)
    (folder / cut / "summary.json").write_text("of an older run")
    interrupted_at(step, options(folder, cut, *more, "--overwrite"), monkeypatch)
    assert (folder / cut / "summary.json").is_file()
    succeed(options(folder, cut, *more, "--resume"))
    assert same_run(folder / whole, folder / cut)
    assert not (folder / cut / "summary.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(options(folder, "gpu", "--device", "cuda")) == 2
    assert "PyTorch finds no GPU here; give 'cpu' or 'auto'" in capsys.readouterr().err


def read(file: Path) -> Configuration:
    return reader.read(file, Configuration)


def written(folder: Path, text: str, suffix: str) -> Path:
    file = folder / f"run{suffix}"
    file.write_text(text)
    return file


def test_toml_and_json_say_the_same_and_the_command_line_overrides_them(tmp_path: Path) -> None:
    toml = written(
        tmp_path, 'seeds = [4]\n[data]\ncorpus = "a.smi"\nstrict = true\n[settings]\ngamma = 2\nevery = 3\n', ".toml"
    )
    content = {"seeds": [4], "data": {"corpus": "a.smi", "strict": True}, "settings": {"gamma": 2, "every": 3}}
    expected = Configuration(
        seeds=(4,), data=Data(corpus=Path("a.smi"), strict=True), settings=Settings(gamma=2.0, every=3)
    )
    assert read(toml) == read(written(tmp_path, json.dumps(content), ".json")) == expected
    line = ["--gamma", "0.5", "--config", str(toml), "--no-strict", "--seeds", "1", "2"]
    given = reader.parse(line, Configuration, prog="mlopt", description="").run
    assert (given.settings.gamma, given.settings.every, given.data.strict, given.seeds) == (0.5, 3, False, (1, 2))
    assert given.data.corpus == Path("a.smi")


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
        ("[settings]\nevery = '4'", "settings.every='4'; it must be a whole number"),
        ("steps = 4.0", "steps=4.0; it must be a whole number"),
        ("steps = true", "steps=True; it must be a whole number"),
        ("seeds = 4", "seeds=4; it must be a list"),
        ("seeds = [4, 'a']", "seeds[1]='a'; it must be a whole number"),
        ("data = 'train.csv'", "data='train.csv'; it must be a table of keys"),
        ("[data]\nlabels = 'solubility'", "data.labels='solubility'; it must be a list"),
        ("[data]\nstrict = 'no'", "data.strict='no'; it must be true or false"),
        ("[data]\ncorpus = 3", "data.corpus=3; it must be a path, as text"),
        ("[data]\nsplit = 'scafold'", "data.split='scafold'; it must be one of 'scaffold', 'random'"),
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


FIELDS = [field.name for part in (Configuration, Data, Settings, EncoderSettings) for field in attrs.fields(part)]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([*FIELDS, *OBJECTIVES]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)
SECTION = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5)
DOCUMENTS = VALUES | st.fixed_dictionaries({}, optional=dict.fromkeys(("data", "settings", "encoder"), SECTION))


def accepted_or_refused(file: Path) -> None:
    try:
        configuration = read(file)
    except ConfigurationError as error:
        assert str(error).startswith(f"{file}: ")  # noqa: PT017 (to be accepted is as good)
        return
    write(configuration, file.with_suffix(".json"))
    assert read(file.with_suffix(".json")) == configuration


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=DOCUMENTS)
def test_any_json_is_accepted_or_refused_with_a_sentence(document: Any, tmp_path: Path) -> None:
    accepted_or_refused(written(tmp_path, json.dumps(document), ".json"))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=8)
    | st.text(max_size=60).map(str.encode)
    | st.lists(st.tuples(st.sampled_from(FIELDS), VALUES.map(json.dumps)), max_size=4).map(
        lambda pairs: "\n".join(f"{key} = {value}" for key, value in pairs).encode()
    )
)
def test_any_toml_is_accepted_or_refused_with_a_sentence(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(content)
    accepted_or_refused(file)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"steps": ' + "9" * 5_000 + "}"])
def test_json_that_python_cannot_hold_is_refused(text: str, tmp_path: Path) -> None:
    accepted_or_refused(written(tmp_path, text, ".json"))
