"""`mlopt tapweight` on small data of each modality."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
from text_cases import encoder, sentences

from mlopt import cli
from mlopt.recipes.tapweight.modality import Configuration
from mlopt.recipes.tapweight.molecules.modality import MoleculeConfiguration
from mlopt.recipes.tapweight.settings import Settings
from mlopt.recipes.tapweight.text.modality import Settings as TextSettings
from mlopt.recipes.tapweight.text.modality import TextConfiguration

#: 40 molecules of different rings, chains and groups.
SMILES = [
    start + "C" * length + end
    for start, length, end in itertools.product(
        ("CC", "c1ccccc1", "N#C", "C1CCNC1", "OC(=O)"), (1, 3), ("O", "Cl", "N", "Br")
    )
]


@attrs.frozen
class Case:
    """A modality's command with a folder of data for it.

    Attributes:
        folder: holds the data, and the outputs of runs.
        name: the name of the modality.
        configuration: the class of its configurations.
        files: the options that name the data.
        small: options for a small run of all objectives and methods.
        fast: options for a run of two objectives by TapWeight alone.
        whole: options of the run that `finished` returns.
        metric: the metric of that run.
        settings: the settings of that run.
        rows: the number of rows of its history.
    """

    folder: Path
    name: str
    configuration: type[Configuration]
    files: list[str]
    small: str
    fast: str
    whole: str
    metric: str
    settings: Settings
    rows: int

    @property
    def command(self) -> list[str]:
        return ["tapweight", self.name]

    def options(self, output: str, *more: str, size: str | None = None) -> list[str]:
        words = [*self.files, *(size or self.fast).split(), "--output", str(self.folder / output), *more]
        return [*self.command, *merged(words)]

    def run(self, output: str, *more: str, size: str | None = None) -> Path:
        succeed(self.options(output, *more, size=size))
        return self.folder / output

    def finished(self) -> Path:
        """Return the output of a run with the default objectives, by all kinds of methods; only the first call runs it."""
        output = self.folder / "finished"
        return output if output.exists() else self.run("finished", *self.whole.split(), size=self.small)


def merged(words: Sequence[str]) -> list[str]:
    """Return options without those that later ones replace: the command refuses an option that is given twice."""
    options: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            name = word.partition("=")[0]
            options.pop(name, None)
            options[name] = [word]
        else:
            options[name].append(word)
    return [word for own in options.values() for word in own]


def molecules(folder: Path) -> Case:
    """Write a corpus of 40 molecules and a table of their lengths."""
    (folder / "corpus.smi").write_text("\n".join([*SMILES, "C1CC no ring"]) + "\n")
    rows = [f"{smiles},{len(smiles) / 10},{int('N' in smiles)}" for smiles in SMILES]
    (folder / "train.csv").write_text("\n".join(["smiles,length,nitrogen", *rows]) + "\n")
    small = "--width 8 --layers 2 --epochs 2 --measurements 2 --split random --device cpu"
    return Case(
        folder,
        "molecules",
        MoleculeConfiguration,
        ["--corpus", str(folder / "corpus.smi"), "--train", str(folder / "train.csv"), "--labels", "length"],
        small=small,
        fast=f"{small} --steps 4 --objectives masked_atoms fingerprint_clusters --methods tapweight",
        whole="--steps 6 --every 2 --seed 3 --methods direct equal rehearsal tapweight",
        metric="rmse",
        settings=Settings(every=2, epochs=2, measurements=2),
        rows=3,  # six steps, of which every second moves the weights
    )


def text(folder: Path) -> Case:
    """Write a tiny encoder, a corpus and labelled texts."""
    encoder().save(folder / "model")
    corpus = "\n".join(text for text, _ in sentences(40, 7))
    (folder / "corpus.txt.gz").write_bytes(gzip.compress(corpus.encode()))
    for seed, (split, count) in enumerate((("train", 40), ("dev", 16), ("test", 16))):
        rows = [json.dumps({"text": text, "label": label}) + "\n" for text, label in sentences(count, seed)]
        (folder / f"{split}.jsonl").write_text("".join(rows))
    files = {"model": "model", "train": "train.jsonl", "valid": "dev.jsonl", "test": "test.jsonl"}
    small = "--max-length 16 --batch-size 8 --epochs 2 --measurements 2 --device cpu --steps 4"
    return Case(
        folder,
        "text",
        TextConfiguration,
        [part for name, file in files.items() for part in (f"--{name}", str(folder / file))],
        small=small,
        fast=f"{small} --objectives masked_tokens contrastive --methods tapweight",
        whole=f"--corpus {folder / 'corpus.txt.gz'} --seed 3 --metric macro_f1 --methods direct equal rehearsal tapweight",
        metric="macro_f1",
        settings=TextSettings(batch_size=8, epochs=2, measurements=2),
        rows=4,
    )


def succeed(arguments: list[str]) -> None:
    assert cli.main(arguments) == 0


def output_of_process(arguments: list[str], folder: Path) -> str:
    """Return the output of a command that succeeds, without warnings, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "mlopt", *arguments],
        cwd=folder, capture_output=True, text=True, check=False, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    # A phase that lasts on a busy machine prints lines, which begin with its number.
    warned = [line for line in done.stderr.splitlines() if not line.startswith("[")]
    assert (done.returncode, warned) == (0, [])
    return done.stdout


def load(*parts: str | Path) -> Any:
    return json.loads(Path(*parts).read_text())


def same_run(first: Path, second: Path) -> bool:
    names = ("weights.json", "scores.json", "history.csv", "encoder/model.safetensors")
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
