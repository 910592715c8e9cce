"""Options that do not exist, are repeated, lack a value or have no effect end in one sentence with a remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import attrs
import pytest

from mlopt import cli
from mlopt.recipes.tapweight.command_line import CommandLine, written_options
from mlopt.recipes.tapweight.methods import METHODS, USED_BY
from mlopt.recipes.tapweight.molecules.modality import MoleculeConfiguration
from mlopt.recipes.tapweight.settings import Settings
from mlopt.recipes.tapweight.text.modality import TextConfiguration
from mlopt.recipes.tapweight.words import options_of

Captured = pytest.CaptureFixture[str]
NEEDED = {"molecules": "--corpus c.smi --train t.csv --output out", "text": "--model m --train t.csv --output out"}
FILES = "--valid v.csv --test w.csv"


def refused(arguments: str, capsys: Captured) -> str:
    """Return the sentence of a command that is refused, without the name of the program."""
    assert cli.main(["tapweight", *arguments.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("mlopt: ")
    assert printed.err.count("\n") == 1
    return printed.err.removeprefix("mlopt: ").rstrip()


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--stps 5", "there is no option --stps; did you mean --steps?"),
        ("--corpus_limt=5", "there is no option --corpus_limt; did you mean --corpus-limit?"),
        ("--zzzzzz 5", "there is no option --zzzzzz; --help lists all"),
        ("-o out", "there is no option -o; --help lists all"),
        ("out --steps 5", "'out' comes before the first option; give options, such as --output FOLDER"),
        ("--steps", "--steps has no value; give one after it"),
        ("--steps --output out", "--steps has no value; give one after it"),
        ("--missing", "--missing has no value; give at least one after it"),
        ("--steps 5 6", "--steps takes one value, and '6' is one too many; put quotes around a value with spaces"),
        ("--strict yes", "--strict takes no value, and 'yes' is one too many; leave it out"),
        ("--steps 5 --steps 6", "--steps is given twice; give it once"),
        ("--labels x --labels y", "--labels is given twice; give it once, with all its values"),
        ("--seed 1 --seeds 2 3", "--seed and --seeds name the same option; give it once, with all its values"),
        ("--strict --no-strict", "--strict and --no-strict name the same option; give it once"),
        ("--device tpu", "--device='tpu'; it must be one of 'auto', 'cpu', 'cuda'"),
        ("--kind classes", "--kind='classes'; it must be one of 'classification', 'regression'"),
    ],
)
def test_words_that_are_not_right(name: str, words: str, sentence: str, capsys: Captured) -> None:
    assert refused(f"{name} {words}", capsys) == sentence


def test_two_names_of_labels(capsys: Captured) -> None:
    expected = "--label and --labels name the same option; give it once, with all its values"
    assert refused("text --label x --labels y", capsys) == expected


@pytest.mark.parametrize("command", ["predict", "embed"])
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("run --inputs a", "there is no option --inputs; did you mean --input?"),
        ("run --input a --input b", "--input is given twice; give it once"),
        ("run --input a", "the following arguments are required: --output; --help lists the options"),
        ("run --output a --input", "argument --input: expected one argument; --help lists the options"),
    ],
)
def test_words_of_predict_and_embed(command: str, words: str, sentence: str, capsys: Captured) -> None:
    assert refused(f"{command} {words}", capsys) == sentence


def test_values_that_look_like_options_are_values() -> None:
    words = ["--missing", "-1", "-", "-.5", "--labels=-x", "--split-fractions", ".8", ".1", ".1", "--no-strict"]
    written = written_options(words, MoleculeConfiguration)
    assert written == {
        "missing": "--missing",
        "labels": "--labels",
        "split_fractions": "--split-fractions",
        "strict": "--no-strict",
    }


@pytest.mark.parametrize("kind", [MoleculeConfiguration, TextConfiguration])
def test_the_options_are_those_of_the_help(kind: Any, capsys: Captured) -> None:
    """The words are checked before they are parsed, so the two must know the same options."""
    name = "text" if kind is TextConfiguration else "molecules"
    with pytest.raises(SystemExit):
        cli.main(["tapweight", name, "--help"])
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", capsys.readouterr().out))
    assert shown == {*options_of(CommandLine), *options_of(kind), "--help"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            f"molecules {NEEDED['molecules']} {FILES} --split random",
            "--split has no effect with --valid and --test, which are the splits; "
            "leave it out, or leave out --valid and --test",
        ),
        (
            f"text {NEEDED['text']} {FILES} --split-fractions 0.8 0.1 0.1",
            "--split-fractions has no effect with --valid and --test, which are the splits; "
            "leave it out, or leave out --valid and --test",
        ),
        (
            f"molecules {NEEDED['molecules']} --split-column s --split scaffold",
            "--split has no effect with --split-column, which names the split of each row; "
            "leave it out, or leave out --split-column",
        ),
        (
            f"text {NEEDED['text']} --splits s.json --split random",
            "--split has no effect with --splits, which lists them; leave it out, or leave out --splits",
        ),
        (
            "text --model m --dataset cola --output out --split-fractions 0.6 0.2 0.2",
            "--split-fractions has no effect on the data set of --dataset, which has its own; "
            "leave it out, or give --train",
        ),
        (
            "text --model m --dataset cola --output out --label x",
            "--label has no effect on the data set of --dataset, which has its own; leave it out, or give --train",
        ),
        (
            "text --model m --dataset cola --output out --strict",
            "--strict has no effect on the data set of --dataset; leave it out, or give --corpus",
        ),
        (
            f"molecules {NEEDED['molecules']} --root r",
            "--root has no effect without --dataset; leave it out, or give --dataset",
        ),
        (
            f"molecules {NEEDED['molecules']} --labels a --ignore-columns b",
            "--ignore-columns has no effect with --labels, which names all columns to predict; "
            "leave it out, or leave out --labels",
        ),
        (
            f"molecules {NEEDED['molecules']} --split random --no-chirality",
            "--no-chirality has no effect on a split that is not by scaffold; leave it out, or give --split scaffold",
        ),
        (
            f"molecules {NEEDED['molecules']} {FILES} --no-chirality",
            "--no-chirality has no effect on a split that is not by scaffold; leave it out, or give --split scaffold",
        ),
        (
            f"text {NEEDED['text']} --gamma 3",
            "--gamma has no effect on the methods of this run; "
            "leave it out, or name in --methods a method that uses it, such as tapweight",
        ),
        (
            f"text {NEEDED['text']} --rehearsals 3 --methods tapweight",
            "--rehearsals has no effect on the methods of this run; "
            "leave it out, or name in --methods a method that uses it, such as rehearsal",
        ),
    ],
)
def test_options_without_effect(words: str, sentence: str, capsys: Captured) -> None:
    assert refused(words, capsys) == sentence


def test_a_key_of_a_file_without_effect(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "run.toml").write_text("[settings]\ngamma = 3.0\n")
    words = f"text {NEEDED['text']} --config {tmp_path / 'run.toml'}"
    assert refused(words, capsys).startswith("--gamma has no effect on the methods of this run; leave it out, or name")


@pytest.mark.parametrize(
    "words", ["--split random", "--split-column s", FILES, "--methods equal tapweight --gamma 2", "--no-chirality"]
)
def test_options_with_effect_are_taken(words: str, capsys: Captured) -> None:
    assert "t.csv: no such file" in refused(f"molecules {NEEDED['molecules']} {words}", capsys)


def test_the_table_names_methods_and_settings_that_exist() -> None:
    keys = {field.name for field in attrs.fields(Settings)} | {"steps", "corpus_limit"}
    assert {key for options in USED_BY for key in options} <= keys
    assert {name for names in USED_BY.values() for name in names} <= {*METHODS, "single"}
