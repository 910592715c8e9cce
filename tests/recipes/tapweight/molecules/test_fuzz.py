"""Any configuration, command line or file of molecules is accepted, or refused with a sentence."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from fuzz_cases import (
    ANY_JSON,
    ANY_TOML,
    MOLECULES,
    DrawnConfiguration,
    DrawnTable,
    arguments,
    configurations,
    mutated,
    tables,
    tasks,
    written,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlopt.errors import MloptError
from mlopt.recipes.tapweight import configuration as reader
from mlopt.recipes.tapweight.command_line import parse
from mlopt.recipes.tapweight.configuration import ConfigurationError, write
from mlopt.recipes.tapweight.files import DataError
from mlopt.recipes.tapweight.molecules.data import Molecules, read_corpus, read_table
from mlopt.recipes.tapweight.molecules.modality import MoleculeConfiguration as Configuration
from mlopt.recipes.tapweight.molecules.task import MoleculeTask

TOML = b"""# All sections.
output = "runs/one"
seeds = [4, 5]
objectives = ["masked_atoms", 'contrastive']
device = "cpu"

[data]
corpus = "a.smi"
train = "b.csv"
labels = ["x", "\\u00fc"]
strict = true

[settings]
gamma = 2
every = 3
warmup = 0.25

[encoder]
dropout = 1e-1
"""
JSON = b"""{"output": "o", "steps": 500, "seeds": [1], "methods": ["equal"],
 "data": {"corpus": "a.csv.gz", "kind": null, "labels": ["\\ud83d\\ude00"]},
 "settings": {"gamma": 0.5, "freeze_encoder": false},
 "encoder": {"width": 8, "norm": "layer"}}"""
ROWS = [
    f"{smiles.strip()},{index % 3 / 2},{index % 2}" for index, smiles in enumerate(MOLECULES * 3) if smiles != "C\nC"
]
CSV = "\n".join(["smiles,y,z", *ROWS, ""]).encode()
QUOTED = b'\xef\xbb\xbf"SMILES","label, in mol/l"\r\n"CCO","0"\r\n"C",1\r\n\r\n"c1ccccc1",\r\nC1CC,nan\r\n'
LINES = b"CCO ethanol\n\n  [Na+]\ta name \nC1CC no ring\nc1ccccc1\n"


def sentence(error: BaseException, *places: object) -> str:
    """Return a message after checking that it is one short printable sentence, and names the places."""
    text = str(error)
    for place in places:
        assert str(place) in text
        text = text.replace(str(place), "PLACE")
    assert text == text.strip()
    assert text.isprintable()
    assert 2 < len(text.split()) < len(text) < 1_500
    return text


def read(file: Path) -> Configuration:
    return reader.read(file, Configuration)


def configuration_file(folder: Path, name: str, content: bytes) -> Configuration | str:
    """Return the content of a file, which must read as itself again, or the sentence that refuses it."""
    file = written(folder, name, content)
    try:
        configuration = read(file)
    except ConfigurationError as error:
        return sentence(error, file)
    write(configuration, folder / "again.json")
    assert read(folder / "again.json") == configuration
    with contextlib.suppress(ConfigurationError):
        try:
            configuration.check()
        except ValueError as error:
            sentence(error)
    return configuration


def drawn_configuration(folder: Path, drawn: tuple[str, DrawnConfiguration]) -> str:
    suffix, configuration = drawn
    content = configuration.json() if suffix == ".json" else configuration.toml()
    outcome = configuration_file(folder, f"drawn{suffix}", content)
    null = suffix == ".toml" and any(value is None for value in configuration.entries.values())  # TOML has none
    if isinstance(outcome, Configuration):
        assert not configuration.wrong
        for (part, key), value in configuration.entries.items():
            held = getattr(getattr(outcome, part) if part else outcome, key)
            assert (
                list(held) == value
                if isinstance(held, tuple)
                else held == (Path(value) if isinstance(held, Path) else value)
            )
        return "accepted"
    assert configuration.wrong or null, outcome
    assert "not valid" in outcome or any(key in outcome or repr(key) in outcome for key in configuration.wrong), outcome
    return "refused"


def changed_configuration(folder: Path, drawn: tuple[str, bytes]) -> str:
    return "accepted" if isinstance(configuration_file(folder, *drawn), Configuration) else "refused"


def command_line(folder: Path, drawn: tuple[list[str], bool]) -> str:
    words, right = drawn
    printed, errors = io.StringIO(), io.StringIO()
    for name, content in (
        ("good.toml", TOML),
        ("good.json", JSON),
        ("bad.json", JSON[:-9]),
        ("bad.toml", b"stepz = 4"),
    ):
        written(folder, name, content)
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        try:
            parse(words, Configuration, prog="mlopt tapweight molecules", description="")
        except MloptError as error:
            assert not right
            files = {Path(word.removeprefix("--config=")) for word in words}
            sentence(error, *(file for file in files if str(error).startswith(f"{file}: ")))
            return "refused"
        except SystemExit as status:
            code = status.code
        else:
            assert printed.getvalue() == errors.getvalue() == ""
            return "accepted"
    if {"-h", "--help"} & {*words} and code == 0:
        assert (right, errors.getvalue()) == (False, "")
        assert printed.getvalue().startswith("usage: mlopt tapweight molecules ")
        return "refused"
    assert (code, right, printed.getvalue()) == (2, False, ""), errors.getvalue()
    assert len(errors.getvalue().split()) > 2
    assert "Traceback" not in errors.getvalue()
    return "refused"


def molecules_of(folder: Path, reader: Callable[..., Any], name: str, content: bytes, **options: Any) -> Any:
    """Return the result of reading a file, or the sentence that refuses it."""
    file = written(folder, name, content)
    try:
        return reader(file, **options)
    except DataError as error:
        text = sentence(error, file)
        assert text.startswith("PLACE")
        assert "; " in text, "no remedy"
        return text


def drawn_table(folder: Path, table: DrawnTable, reader: Callable[..., Molecules]) -> str:
    options: dict[str, Any] = {"labels": table.labels, "kind": "regression"} if reader is read_table else {}
    outcome = molecules_of(folder, reader, table.name, table.content, strict=table.strict, **options)
    if isinstance(outcome, str):
        assert table.refused, outcome
        row = re.match(r"PLACE, row (\d+)[,:]", outcome)
        assert 0 in table.refused or (row and int(row[1]) in table.refused), (table.refused, outcome)
        return "refused"
    assert not table.refused, table.refused
    assert outcome.rows == tuple(table.rows)
    assert tuple(skipped.row for skipped in outcome.skipped) == table.skipped
    assert outcome.smiles == tuple(smiles for smiles, _ in table.rows.values())
    if reader is read_table:
        assert outcome.label_names == table.labels
        labels = torch.tensor([labels for _, labels in table.rows.values()])
        torch.testing.assert_close(torch.cat([graph.y for graph in outcome]), labels, rtol=0, atol=0, equal_nan=True)
    sentence(ValueError(outcome.summary()))
    return "accepted"


def decoded(content: bytes) -> str:
    """Return the text of a file that is accepted: UTF-8, else Windows-1252."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252")


def changed_molecules(folder: Path, drawn: tuple[str, bytes, Callable[..., Molecules], bool]) -> str:
    name, content, reader, strict = drawn
    outcome = molecules_of(folder, reader, name, content, strict=strict)
    if isinstance(outcome, str):
        return "refused"
    assert len(outcome) == len(outcome.rows) == len(set(outcome.rows)) > 0
    if ".csv" not in name:
        text = decoded(gzip.decompress(content) if name.endswith(".gz") else content)
        lines = io.StringIO(text, newline=None).read().split("\n")
        assert outcome.smiles == tuple(lines[row - 1].split()[0] for row in outcome.rows)
        molecules = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
        assert len(outcome) + len(outcome.skipped) == len(molecules)
    return "accepted"


def task_of(folder: Path, drawn: tuple[list[bytes], dict[str, Any]]) -> str:
    contents, options = drawn
    files = [written(folder, f"{name}.csv", content) for name, content in zip(("a", "b", "c"), contents, strict=False)]
    more = dict(zip(("valid", "test"), files[1:], strict=False))
    try:
        task = MoleculeTask.from_csv(files[0], **more, **options)
    except DataError as error:
        text = sentence(error)
        assert "; " in text or ": give" in text, text
        return "refused"
    for remark in task.remarks:
        sentence(ValueError(remark))
    splits = [list(zip(split.rows, split, strict=True)) for split in task.splits.values()]
    for own, file in zip(splits if more else [[row for part in splits for row in part]], files, strict=True):
        table = dict(enumerate(csv.DictReader(file.read_text().splitlines()), start=2))
        kept = [line for line, row in table.items() if row["smiles"] != "C1CC"]
        assert sorted(row for row, _ in own) == kept
        for row, graph in own:
            plain = torch.tensor([[float(table[row][name] or math.nan) for name in task.label_names]])
            torch.testing.assert_close(graph.y, plain, rtol=0, atol=0, equal_nan=True)
    labels = torch.cat([graph.y for own in splits for _, graph in own])
    assert task.kind == (
        options["kind"] or ("classification" if {*labels[~labels.isnan()].tolist()} <= {0, 1} else "regression")
    )
    return "accepted"


@attrs.frozen
class Kind:
    """Inputs of one kind: their distribution, the check of one, and the numbers drawn in all and in a sample."""

    drawn: st.SearchStrategy[Any]
    check: Callable[[Path, Any], str]
    all: int
    sample: int


FILES = ("good.toml", "good.json", "bad.json", "bad.toml", "none.json", "train.csv", ".", "x" * 300 + ".json")
TABLES, LISTS = (CSV, QUOTED), (LINES, b"C\nCC\nCCC\n")
CHANGED = st.one_of(
    st.tuples(st.just("a.csv"), mutated(TABLES)),
    st.tuples(st.just("a.csv.gz"), mutated(TABLES).map(gzip.compress)),
    st.tuples(st.sampled_from(["a.smi", "a.txt"]), mutated((*LISTS, CSV))),
    st.tuples(st.sampled_from(["a.smi.gz", "a.csv.gz"]), mutated(tuple(map(gzip.compress, (*TABLES, *LISTS))))),
)
READERS = st.sampled_from([read_table, read_corpus, read_corpus])
KINDS = {
    "nearly right JSON": Kind(st.tuples(st.just(".json"), configurations()), drawn_configuration, 2_000, 300),
    "nearly right TOML": Kind(st.tuples(st.just(".toml"), configurations()), drawn_configuration, 2_000, 300),
    "changed configurations": Kind(
        st.tuples(st.just("a.json"), mutated((JSON,))) | st.tuples(st.just("a.toml"), mutated((TOML,))),
        changed_configuration, 2_000, 300,
    ),
    "command lines": Kind(arguments(FILES), command_line, 700, 70),
    "tables": Kind(tables(labelled=True), lambda folder, table: drawn_table(folder, table, read_table), 1_000, 250),
    "corpora": Kind(tables(labelled=False), lambda folder, table: drawn_table(folder, table, read_corpus), 600, 100),
    "changed molecules": Kind(
        st.tuples(CHANGED, READERS, st.sampled_from([False] * 5 + [True])).map(lambda drawn: (*drawn[0], *drawn[1:])),
        changed_molecules, 1_000, 150,
    ),
    "tasks": Kind(tasks(), task_of, 700, 80),
}  # fmt: skip


def drive(kind: Kind, count: int, folder: Path) -> None:
    """Try `count` inputs, and print the numbers of accepted and refused ones.

    They are the same each time as long as the same modules are imported: Hypothesis also draws constants of their sources. So a
    check must hold for any text, such as "-h".
    """
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=count, derandomize=True, database=None, deadline=10_000, suppress_health_check=list(HealthCheck)
    )
    @given(kind.drawn)
    def attempt(drawn: Any) -> None:
        outcomes[kind.check(folder, drawn)] += 1

    attempt()
    print(dict(outcomes))
    assert len(outcomes) == 2  # else half of the property was not tried


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_accepted_or_refused_with_a_sentence(kind: str, tmp_path: Path) -> None:
    drive(KINDS[kind], KINDS[kind].sample, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all_are_accepted_or_refused_with_a_sentence(kind: str, tmp_path: Path) -> None:
    assert sum(inputs.all for inputs in KINDS.values()) == 10_000
    drive(KINDS[kind], KINDS[kind].all, tmp_path)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(document=ANY_JSON)
def test_any_json_is_accepted_or_refused_with_a_sentence(document: Any, tmp_path: Path) -> None:
    configuration_file(tmp_path, "a.json", json.dumps(document).encode())


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=8) | ANY_TOML.map(str.encode))
def test_any_toml_is_accepted_or_refused_with_a_sentence(content: bytes, tmp_path: Path) -> None:
    configuration_file(tmp_path, "a.toml", content)


# Faults that random inputs found, each a test of its own.

BEYOND = {"400 digits": "9" * 400, "too many digits to be written": "0x" + "f" * 4_000}


@pytest.mark.parametrize("digits", BEYOND)
@pytest.mark.parametrize("key", ["steps", "encoder.width", "data.corpus", "seeds"])
def test_a_huge_integer_is_refused_with_its_key(key: str, digits: str, tmp_path: Path) -> None:
    value = f"[{BEYOND[digits]}]" if key == "seeds" else BEYOND[digits]
    refused = configuration_file(tmp_path, "a.toml", f"{key} = {value}".encode())
    assert f"{key.rpartition('.')[2]}=" in refused
    assert len(refused) < 400


@pytest.mark.parametrize(
    ("option", "place"),
    [("--steps", "steps=9"), ("--width", "width=9"), ("--corpus-limit", "--corpus-limit=9"), ("--seeds", "seeds=[9")],
)
def test_a_huge_option_is_refused(option: str, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, MloptError)) as refusal:
        parse([option, "9" * 400], Configuration, prog="mlopt", description="")
    assert place in f"{refusal.value}{capsys.readouterr().err}"


@pytest.mark.parametrize("words", [["-h"], ["--steps", "5", "-h"], ["--labels", "a", "--help", "--stepz"]])
def test_help_among_other_words_prints_the_usage(words: list[str], tmp_path: Path) -> None:
    assert command_line(tmp_path, (words, False)) == "refused"


@pytest.mark.parametrize("text", ['{"%s": 1}', '{"device": "%s"}', '{"data": ["%s"]}', '["%s"]'])
def test_a_long_value_is_shortened(text: str, tmp_path: Path) -> None:
    assert "xxx..." in configuration_file(tmp_path, "a.json", (text % ("x" * 10_000)).encode())


@pytest.mark.parametrize("text", ["[" * 100_000, '{"steps": ' + "9" * 5_000 + "}"])
def test_json_that_python_cannot_hold_is_refused(text: str, tmp_path: Path) -> None:
    assert configuration_file(tmp_path, "a.json", text.encode()).startswith("PLACE: ")


def test_lists_too_deep_to_be_written_are_refused(tmp_path: Path) -> None:
    for depth in range(900, 1_000, 3):  # near the deepest that can be read
        configuration_file(tmp_path, "a.json", b"[" * depth + b"]" * depth)


@pytest.mark.parametrize("path", ["a\0b", "\ud800"])
def test_a_path_that_no_file_system_accepts_is_refused(path: str, tmp_path: Path) -> None:
    refused = configuration_file(tmp_path, "a.json", json.dumps({"output": path}).encode())
    assert refused == f"PLACE: output={path!r}; it must be a path, as text"


@pytest.mark.parametrize("name", ["x" * 300, "folder", "train.csv/under"])
def test_a_path_that_cannot_be_opened_is_refused(name: str, tmp_path: Path) -> None:
    written(tmp_path, "train.csv", CSV)
    for suffix, opener, kind in (
        (".json", read, ConfigurationError),
        (".csv", read_table, DataError),
        (".smi", read_corpus, DataError),
    ):
        path = tmp_path / f"{name}{suffix}"
        (tmp_path / f"folder{suffix}").mkdir()
        with pytest.raises(
            kind, match=r"(File name too long|Is a directory|Not a directory|is a folder); give the path of a"
        ) as error:
            opener(path)
        sentence(error.value, path)


def test_a_path_with_a_nul_is_reported_as_missing() -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_table("a\0.csv")


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("byte", [b"\0", b"\xff"])
def test_a_byte_that_is_not_text_is_reported_with_its_row_for_any_line_ends(
    end: bytes, byte: bytes, tmp_path: Path
) -> None:
    refused = molecules_of(tmp_path, read_table, "a.csv", end.join([b"smiles,y", b"C,1", b"C" + byte]))
    assert refused.startswith("PLACE, row 3: ")


def test_a_header_of_two_lines_is_shown_in_one(tmp_path: Path) -> None:
    refused = molecules_of(tmp_path, read_table, "a.csv", b'"two\nlines",smiles\n1,C\n', labels=[])
    assert refused == r"PLACE: labels=[] names no label column; available: 'two\nlines', 'smiles'; give --labels"


@pytest.mark.parametrize("row", ["{}", "C,{}"])
def test_a_long_cell_is_shortened(row: str, tmp_path: Path) -> None:
    cell = row.format("x" * 10_000)
    cells = cell if "," in cell else f"{cell},1"
    assert "xxx..." in molecules_of(tmp_path, read_table, "a.csv", f"smiles,y\n{cells}\n".encode(), strict=True)
