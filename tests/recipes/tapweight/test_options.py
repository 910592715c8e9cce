"""Every option of the command of a modality that takes some values only: it is listed with them, and refused by its name."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import attrs
import pytest

from mlopt import cli
from mlopt.recipes.tapweight.molecules.modality import MoleculeConfiguration
from mlopt.recipes.tapweight.text.modality import TextConfiguration

KINDS = {"molecules": MoleculeConfiguration, "text": TextConfiguration}
#: The names of Python that no user of the command knows.
INTERNAL = re.compile(r"Settings|Configuration|\bData\b|CommandLine|GINE|ArgumentError|run\.(data|settings|encoder)")


def fields(kind: type) -> Iterator[attrs.Attribute[Any]]:
    """Yield the options of a configuration, those of its sections included."""
    for field in attrs.fields(attrs.resolve_types(kind)):
        if attrs.has(field.type):
            yield from fields(field.type)
        else:
            yield field


def choices(field: attrs.Attribute[Any]) -> tuple[str, ...]:
    """Return the values of an option that takes one of a few, else nothing."""
    parts = [field.type, *get_args(field.type), *(inner for part in get_args(field.type) for inner in get_args(part))]
    return next((get_args(part) for part in parts if get_origin(part) is Literal), ())


def bad_values(field: attrs.Attribute[Any]) -> list[list[str]]:
    """Return words that an option cannot take."""
    kinds = {field.type, *get_args(field.type)}
    if kinds & {int, float}:
        refused = [["nonsense"]]
        return [*refused, ["-9"]] if field.validator is not None else refused
    if field.validator is not None or choices(field):
        return [["nonsense"]]
    return []


CASES = [
    pytest.param(name, field.name, words, id=f"{name}-{field.name}-{words[0]}")
    for name, kind in KINDS.items()
    for field in fields(kind)
    for words in bad_values(field)
]


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the message of a command that is refused, without the box that tyro draws."""
    with contextlib.suppress(SystemExit):  # of tyro
        assert cli.main(arguments) == 2
    return " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().err).split())


def test_there_are_cases() -> None:
    names = {case.values[1] for case in CASES}
    assert {"seeds", "methods", "split_fractions", "lr_schedule", "warmup", "dropout", "max_length"} <= names
    assert len(CASES) > 100


@pytest.mark.parametrize(("name", "option", "words"), CASES)
def test_a_refusal_names_the_option_and_no_class(
    name: str, option: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flag = f"--{option.replace('_', '-')}"
    message = refusal(["tapweight", name, flag, *words], capsys)
    assert flag in message.partition("For full helptext")[0]
    assert words[0].lstrip("-") in message
    assert not INTERNAL.search(message)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--steps many", "--steps='many'; it must be a whole number"),
        ("--steps=many", "--steps='many'; it must be a whole number"),
        ("--seed 1.5", "--seed='1.5'; it must be a whole number"),
        ("--seeds 1 2 x", "--seeds='x'; it must be a whole number"),
        ("--corpus-limit 1e3", "--corpus-limit='1e3'; it must be a whole number"),
        ("--finetune-lr fast", "--finetune-lr='fast'; it must be a number"),
        ("--split-fractions 0.8 0.1 rest", "--split-fractions='rest'; it must be a number"),
        ("--seed -1", "--seed=[-1]; seeds are whole numbers from 0 to 4294967295"),
    ],
)
def test_a_word_in_place_of_a_number_gets_one_sentence(
    name: str, words: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tapweight", name, *words.split()]) == 2
    assert capsys.readouterr().err == f"mlopt: {sentence}\n"


@pytest.mark.parametrize("name", KINDS)
def test_the_help_lists_the_choices(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The metrics are listed in the text of the option: which of them fit depends on the labels."""
    with pytest.raises(SystemExit):
        cli.main(["tapweight", name, "--help"])
    printed = re.sub(r"[│\s]", "", capsys.readouterr().out)
    listed = [field for field in fields(KINDS[name]) if choices(field)]
    assert {"precision", "scale", "lr_schedule", "device", "split"} <= {field.name for field in listed}
    for field in listed:
        if field.name != "metric":
            assert f"--{field.name.replace('_', '-')}{{{','.join(choices(field))}}}" in printed


@pytest.mark.parametrize("name", KINDS)
def test_a_file_names_its_keys_and_no_class(name: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.toml"
    file.write_text("steps = 0\n[settings]\nrehearsals = 0\nscale = 'gradient'\nwarmup = 1.0\nensemble = 0\n")
    assert refusal(["tapweight", name, "--config", str(file)], capsys) == (
        f"mlopt: {file}: steps=0; it must be a whole number >= 1; settings.warmup=1.0; it must be a number >= 0 and < 1; "
        "settings.rehearsals=0; it must be a whole number >= 1; and 1 more"
    )
