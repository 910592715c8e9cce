"""Random inputs for the readers: nearly right configurations, tables with a known reading, valid files with changed bytes."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

import attrs
from hypothesis import strategies as st

from mlopt.recipes.tapweight.molecules.modality import Data, EncoderSettings
from mlopt.recipes.tapweight.molecules.modality import MoleculeConfiguration as Configuration
from mlopt.recipes.tapweight.molecules.objectives import OBJECTIVES
from mlopt.recipes.tapweight.settings import Settings

Draw = Any
Strategy = st.SearchStrategy[Any]

QUOTE = '"'
WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
#: The last is an integer that Python reads, but does not write.
HUGE = st.sampled_from([10**400, -(10**400), 10**4_000])
WRONG = st.none() | st.floats() | WORDS | st.just([[]]) | st.dictionaries(WORDS, st.integers(), max_size=2)


def _whole(least: int) -> tuple[Strategy, Strategy]:
    return st.integers(least, 2**40), st.booleans() | st.integers(max_value=least - 1) | HUGE | WRONG


def _choice(*values: str) -> tuple[Strategy, Strategy]:
    near = st.sampled_from([value[:-1] for value in values] + [value.upper() for value in values])
    return st.sampled_from(values), near | st.integers() | HUGE | WRONG.filter(lambda value: value is not None)


def _list(right: Strategy, wrong: Strategy, least: int) -> tuple[Strategy, Strategy]:
    broken = st.tuples(st.lists(right, max_size=2), wrong).map(lambda pair: [*pair[0], pair[1]])
    few = [st.just([]), right.map(lambda value: [value, value])] if least else []
    return st.lists(right, min_size=least, max_size=4, unique=True), st.one_of(broken, st.integers(), WORDS, *few)


NUMBER = (
    st.floats(0.01, 0.99) | st.floats(0.01, 0.99).map(lambda x: float(f"{x:.2e}")),
    st.sampled_from([math.nan, math.inf, -math.inf, -1, -0.5, "0.5", True, None, [0.5], {}]) | HUGE,
)
FLAG = (st.booleans(), st.sampled_from([0, 1, "true", "no", None, [], 1.0]))
TEXT = (WORDS, st.integers() | st.booleans() | HUGE | st.just(["a"]) | st.just({}) | st.floats())
PATH = (WORDS.map(lambda word: word.replace("\0", "")), TEXT[1] | st.sampled_from(["a\0b", "\ud800"]))
SEED = (st.integers(0, 2**32 - 1), st.sampled_from([-1, 2**32, 1.5, "1", True, None]) | HUGE)
#: For each key, values that it takes and values that it must refuse.
VALUES: dict[str, tuple[Strategy, Strategy]] = {
    **dict.fromkeys(("output", "corpus", "train", "valid", "test", "root", "splits"), PATH),
    **dict.fromkeys(("gamma", "pretraining_lr", "finetuning_lr", "warmup", "weights_lr", "finetune_lr"), NUMBER),
    **dict.fromkeys(("weight_decay", "dropout"), NUMBER),
    **dict.fromkeys(("chirality", "strict", "freeze_encoder", "residual"), FLAG),
    **dict.fromkeys(("batch_size", "measurements", "corpus_limit"), _whole(2)),
    **dict.fromkeys(
        (
            "steps",
            "every",
            "task_batch_size",
            "valid_batch_size",
            "epochs",
            "finetunings",
            "ensemble",
            "rehearsal_steps",
            "rehearsals",
        ),
        _whole(1),
    ),
    **dict.fromkeys(("width", "layers", "checkpoint_every"), _whole(1)),
    "patience": _whole(0),
    "class_weights": _choice("none", "balanced"),
    **dict.fromkeys(("dataset", "smiles_column", "split_column"), TEXT),
    "kind": _choice("classification", "regression"),
    "metric": _choice("roc_auc", "pr_auc", "f1", "rmse", "mae", "r2"),
    "split": _choice("scaffold", "balanced", "random", "stratified"),
    "norm": _choice("batch", "layer"),
    "pooling": _choice("mean", "sum"),
    "device": _choice("auto", "cpu", "cuda"),
    "lr_schedule": _choice("constant", "linear", "cosine"),
    "precision": _choice("none", "bf16", "fp16"),
    "scale": _choice("gradient", "none"),
    "seeds": _list(*SEED, least=1),
    "objectives": _list(*_choice(*OBJECTIVES), least=1),
    "methods": _list(*_choice("direct", "equal", "tapweight"), least=1),
    **dict.fromkeys(("labels", "missing", "ignore_columns"), _list(WORDS, st.integers() | HUGE | st.none(), least=0)),
    "split_fractions": (st.just([0.5, 0.25, 0.25]), st.sampled_from([[0.5, 0.5], [0.5, 0.4, 0.2], [1, 0, 0], 0.5, ["a"]])),
}  # fmt: skip
OPTIONAL = ("output", "corpus", "corpus_limit", "train", "valid", "test", "dataset", "labels", "kind", "metric")
OPTIONAL += ("smiles_column", "split_column", "splits")
SECTIONS = {"": Configuration, "data": Data, "settings": Settings, "encoder": EncoderSettings}
PLACES = [(part, name) for part, kind in SECTIONS.items() for name in attrs.fields_dict(kind) if name not in SECTIONS]
#: Any content that JSON can write, with keys and values of configurations in it.
KEYS = st.sampled_from([*VALUES, "data", "settings", "encoder"])
CONTENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | KEYS | st.sampled_from([*OBJECTIVES]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | WORDS, inner, max_size=4),
    max_leaves=12,
)
SECTION = st.dictionaries(KEYS, CONTENTS, max_size=5)
ANY_JSON = CONTENTS | st.fixed_dictionaries({}, optional=dict.fromkeys(("data", "settings", "encoder"), SECTION))
LINE = st.tuples(KEYS, CONTENTS.map(json.dumps)).map(" = ".join)
ANY_TOML = st.text(max_size=60) | st.lists(LINE, max_size=4).map("\n".join)


@attrs.frozen
class DrawnConfiguration:
    """Entries (section, key, value), and the keys among them that must be refused."""

    entries: dict[tuple[str, str], Any]
    wrong: tuple[str, ...]

    def nested(self) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for (part, key), value in self.entries.items():
            (content.setdefault(part, {}) if part else content)[key] = value
        return content

    def json(self) -> bytes:
        return json.dumps(self.nested()).encode()

    def toml(self) -> bytes:
        lines = []
        for part in SECTIONS:
            lines += [f"[{part}]"] if part else []
            lines += [f"{_toml(key)} = {_toml(value)}" for (own, key), value in self.entries.items() if own == part]
        return "\n".join(lines).encode()


@st.composite
def configurations(draw: Draw) -> DrawnConfiguration:
    """Draw a configuration with at most one wrong entry."""
    entries: dict[tuple[str, str], Any] = {}
    wrong = []
    places = draw(st.lists(st.sampled_from(PLACES), min_size=1, max_size=6, unique=True))
    flawed = draw(st.sampled_from([*places, *[None] * len(places)]))
    for part, key in places:
        flaw = draw(st.sampled_from(["value", "value", "key"])) if (part, key) == flawed else "none"
        right, refused = VALUES[key]
        value = draw(refused if flaw == "value" else right)
        if flaw == "value" and not (value is None and key in OPTIONAL):
            wrong.append(key)
        if flaw == "key":
            near = st.sampled_from(
                [key[:-1], key + "s", key.upper(), f"{key} ", f"{key}\n", key.replace("_", "-") + "_"]
            )
            key = draw(near | WORDS)
            if key in ("data", "settings", "encoder") or (part, key) in PLACES or (part, key) in entries:
                continue
            wrong.append(key)
        entries[part, key] = value
    return DrawnConfiguration(entries, tuple(wrong))


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + "".join(c if c.isascii() and c.isalnum() else f"\\U{ord(c):08x}" for c in value) + '"'
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(entry)}" for key, entry in value.items()) + "}"
    if value == 10**4_000:
        return f"0x{'f' * 9_000}"
    return "null" if value is None else repr(value)


@st.composite
def arguments(draw: Draw, files: tuple[str, ...]) -> tuple[list[str], bool]:
    """Draw a command line; return True with it if all of it is right."""
    words: list[str] = []
    right = True
    for _, key in draw(st.lists(st.sampled_from(PLACES), min_size=1, max_size=4, unique=True)):
        flaw = draw(st.sampled_from(["none"] * 5 + ["value", "key", "missing", "word", "config"]))
        right &= flaw == "none"
        good, refused = VALUES[key]
        value = draw(refused if flaw == "value" else good)
        option = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
            continue
        values = [_word(entry) for entry in value] if isinstance(value, list) else [_word(value)]
        # A value that looks like an option, or "None", means something else to every command line.
        right &= not any(re.match(r"-|None\Z|\Z", entry) for entry in values)
        if flaw == "key":
            option = draw(st.sampled_from([option[:-1], f"{option}s", option[1:], option.upper(), "--", "-", ""]))
        if flaw == "missing":
            values = []
        if flaw == "word":
            values.insert(
                draw(st.integers(0, len(values))), draw(WORDS | st.sampled_from(["", "--", "-", "[/b]", "\udc80"]))
            )
        right &= bool(values)  # an empty list is written as an option without a value
        if flaw == "config":
            words += ["--config", draw(st.sampled_from(files) | WORDS)]
        words += [f"{option}={values[0]}"] if len(values) == 1 and draw(st.booleans()) else [option, *values]
    if draw(st.integers(0, 9)) == 0:
        words, right = [*words, *words[: draw(st.integers(0, len(words)))]], False
    return words, right


def _word(value: Any) -> str:
    return "9" * 9_000 if value == 10**4_000 else str(value)


MOLECULES = (
    "C", "CCO", "c1ccccc1", "[Na+].[Cl-]", "C/C=C/[C@H](N)O", "*", " CC ", "CC(=O)Oc1ccccc1C(=O)O", "[2H]C", "[999C]", "C\nC",
)  # fmt: skip
NONSENSE = (
    "", " ", "C1CC", "xyz", "C[N](C)(C)(C)C", "[C-7]", "c1cccc1", "(", "C(", "[", "naïve", "1", "nan", 'C"', "C,C",
    "C%", "[*:1", "C.", "->", "CC |$;", "#", "[H][H][H]", "'", "C;C", "C" * 9 + "(" * 300, "C" + ")" * 9,
)  # fmt: skip
NUMBERS = {
    "1": 1.0, "0": 0.0, "-2.5e1": -25.0, " 3 ": 3.0, ".5": 0.5, "+7.": 7.0, "1e38": 1e38, "1e-50": 1e-50, "\u00a02": 2.0,
    **dict.fromkeys(("", " ", "nan", "NaN", "-nan", "None"), math.nan),
}  # fmt: skip
NO_NUMBERS = (
    "high", "1,5,5", "1_0", "inf", "-Infinity", "1e400", "1e39", "0x1", "1 2", "1\n2", '"', "True", "½", "--1",
)  # fmt: skip
NAMES = ("y", "Y2", "logS", "naïve", " padded ", "two words", "measured, in mol/l", "")


@attrs.frozen
class DrawnTable:
    """A file, the options to read it with, and its expected rows, with SMILES and labels, or the rows that may be refused.

    A refused row of 0 is the file as a whole.
    """

    name: str
    content: bytes
    strict: bool
    labels: tuple[str, ...]
    rows: dict[int, tuple[str, list[float]]]
    skipped: tuple[int, ...]
    refused: frozenset[int] = frozenset()


def line_of(text: str, end: int) -> int:
    """Return the number, from 1, of the line of a place in an editor."""
    return len(re.findall(r"\r\n|\r|\n", text[:end])) + 1


@st.composite
def tables(draw: Draw, labelled: bool) -> DrawnTable:
    """Draw a table with at most a few flaws, and its expected reading."""
    rare = st.integers(0, 24).map(lambda drawn: drawn == 13)  # hypothesis draws the ends more often
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
    header = draw(st.permutations([draw(st.sampled_from(["smiles", "SMILES", " Smiles"])), *names]))
    at = next(index for index, name in enumerate(header) if name.strip().lower() == "smiles")
    labels = tuple(name.strip() for index, name in enumerate(header) if index != at)
    if twice := draw(rare):
        header[at] = header[at - 1]
    end, quoted = draw(st.sampled_from(["\n", "\r\n", "\r"])), draw(st.booleans())
    strict, text = draw(rare), ""
    rows: dict[int, tuple[str, list[float]]] = {}
    skipped: list[int] = []
    refused = {0} if twice else set()
    columns: list[list[str]] = [[] for _ in names]
    for index in range(-1, draw(st.integers(0, 8))):
        text += end * (draw(st.integers(0, 9)) == 0)
        line = line_of(text, len(text))
        good = draw(st.integers(0, 5)) > 0
        smiles = draw(st.sampled_from(MOLECULES if good else NONSENSE))
        cells = [draw(st.sampled_from(sorted(NUMBERS) if not draw(rare) else NO_NUMBERS)) for _ in names]
        values = [NUMBERS.get(cell) for cell in cells]
        record = header if index < 0 else [*cells[:at], smiles, *cells[at:]]
        ragged = index >= 0 and draw(rare)
        record = ([*record, "1"] if draw(st.booleans()) else record[:-1]) if ragged else record
        if len(record) < len(header) and not header[-1].strip():
            # A column without a name may end before the others.
            ragged, cells[-1], values[-1] = False, "", math.nan
        text += ",".join(_cell(cell, quoted or len(record) == 1) for cell in record) + end
        if index < 0:
            continue
        for column, cell in zip(columns, cells, strict=True):
            column.append(cell)
        # A column is read as a whole; only then are rows left out.
        words = any(value is None and not _is_number(cell) for value, cell in zip(values, cells, strict=True))
        if ragged or (strict and not good) or (labelled and (words or (good and None in values))):
            refused.add(line)
        elif good:
            rows[line] = smiles.strip(), [value for value in values if value is not None]
        else:
            skipped.append(line)
    if draw(rare):
        refused.add(line_of(text, len(text)))
        text += f'"open{end}'
    empty = any(all(NUMBERS.get(cell, 0) != NUMBERS.get(cell, 0) for cell in column) for column in columns)
    if (not refused and len(rows) < (1 if labelled else 2)) or (labelled and empty):
        refused.add(0)
    if draw(st.booleans()):
        text = text.removesuffix(end)
    return _encoded(draw, text, DrawnTable("", b"", strict, labels, rows, tuple(skipped), frozenset(refused)))


def _is_number(cell: str) -> bool:
    """Return True for a number that is too large, which is refused if its row is not left out."""
    try:
        return "_" not in cell and math.isfinite(float(cell)) is not None
    except ValueError:
        return False


def _cell(cell: str, quoted: bool) -> str:
    return f'"{cell.replace(QUOTE, 2 * QUOTE)}"' if quoted or any(c in cell for c in '\r\n",') else cell


def _encoded(draw: Draw, text: str, table: DrawnTable) -> DrawnTable:
    """Write a table's text as bytes, some of which cannot be read."""
    encoding = draw(st.sampled_from(["utf-8"] * 9 + ["utf-8-sig"] * 9 + ["utf-16", "utf-16-le", "nul"]))
    if encoding == "utf-16-le" and not text.isascii():
        encoding = "utf-16"
    if encoding == "nul":
        place = draw(st.integers(0, len(text)))
        text, encoding = f"{text[:place]}\0{text[place:]}", "utf-8"
        table = attrs.evolve(table, refused=frozenset((line_of(text, place),)))
    content = text.encode(encoding, errors="replace")
    if draw(st.integers(0, 3)) > 0:
        return attrs.evolve(table, name="drawn.csv", content=content)
    content, damage = gzip.compress(content), draw(st.sampled_from([""] * 6 + ["cut", "sum", "plain"]))
    if damage == "cut":
        content = content[: draw(st.integers(1, len(content) - 1))]
    elif damage == "sum":
        content = content[:-8] + bytes([content[-8] ^ 1]) + content[-7:]
    elif damage == "plain":
        content = gzip.decompress(content)
    if damage:
        table = attrs.evolve(table, refused=frozenset((0,)))
    return attrs.evolve(table, name="drawn.csv.gz", content=content)


@st.composite
def tasks(draw: Any) -> tuple[list[bytes], dict[str, Any]]:
    """Draw one labelled table or three, and the options of a task."""
    classes = draw(st.booleans())
    label = st.sampled_from((["0", "1"] * 8 if classes else ["0.5", "-1", "2e3", "1", "3.4e38"]) + [""])
    longer = [f"{ring}{'C' * size}" for ring in ("", "c1ccccc1", "C1CC1", "c1ccncc1") for size in range(1, 7)]
    row = st.tuples(st.sampled_from([*longer, "C1CC", "[Na+]", "*"]), label, label).map(",".join)
    files = draw(st.sampled_from([1, 1, 1, 2, 3, 3, 3]))
    content = []
    for _ in range(files):
        rows = draw(st.lists(row, min_size=(size := draw(st.sampled_from([1, 10, 30, 30]))), max_size=size + 10))
        content.append("\n".join([draw(st.sampled_from(["smiles,y,z"] * 15 + ["smiles,y,x"])), *rows]).encode())
    options = {
        "labels": draw(st.sampled_from([None] * 4 + [["y"]] * 4 + [["z", "y"], ["w"], []])),
        "kind": draw(st.sampled_from([None] * 6 + ["classification", "regression"])),
        "metric": draw(st.sampled_from([None] * 6 + ["roc_auc", "rmse", "mae"])),
        "split": draw(st.sampled_from(["random", "scaffold", "balanced"])),
        "chirality": draw(st.booleans()),
        "strict": draw(st.sampled_from([False] * 6 + [True])),
        "seed": draw(st.integers(0, 9)),
    }
    return content, options


PIECES = (
    b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\0", b"\r", b"\r\n", b"\n\n", b'"', b'""', b"'", b",", b";", b"\t", b"\\",
    b"\\ud800", b"#", b"[", b"[[", b"{", b"}", b"=", b"1e999999", b"nan", b"Infinity", b"null", b"9" * 400, b"9" * 10_000,
    b"0x" + b"f" * 9_000, b"[" * 10_000, b"[" * 900 + b"]" * 900, b'{"a":' * 10_000, b"a." * 2_000, b"C" * 150_000, b"C(" * 5_000,
    b"\xc2\xa0", "ü".encode(), "\u2028".encode(), b"1979-05-27T07:32:00Z", b"\x85", b"\x1c",
)  # fmt: skip


@st.composite
def mutated(draw: Draw, originals: tuple[bytes, ...]) -> bytes:
    """Draw a valid file with a few places changed: bytes flipped, deleted, inserted, repeated, cut off, or from another file."""
    content = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 4]))):
        at, length = draw(st.integers(0, len(content))), draw(st.integers(1, 12))
        change = draw(st.sampled_from(["flip", "delete", "insert", "repeat", "cut", "splice", "lines"]))
        if change == "flip":
            content[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif change == "delete":
            del content[at : at + length]
        elif change == "insert":
            content[at:at] = draw(st.sampled_from(PIECES))
        elif change == "repeat":
            content[at:at] = content[at : at + 5 * length]
        elif change == "cut":
            del content[at:]
        elif change == "splice":
            other = draw(st.sampled_from(originals))
            start = draw(st.integers(0, len(other)))
            content[at : at + length] = other[start : start + 3 * length]
        else:
            content = content.replace(b"\n", draw(st.sampled_from([b"\r\n", b"\r", b"\n\n", b"\n\r"])))
    return bytes(content)


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path
