"""Tables as people have them: each is read with the right values, or refused in one sentence with a remedy."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from mlopt.recipes.tapweight.files import DataError
from mlopt.recipes.tapweight.tables import Table, table_of

HEADER, CELLS = ("name", "y"), [["a", "1.5"], ["b", "-2"]]
PLAIN = "name,y\na,1.5\nb,-2\n"


def zipped(content: bytes, *names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, content)
    return stream.getvalue()


def parquet(**columns: list[Any]) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def cells_of(table: Table) -> list[list[Any]]:
    return [list(cells) for cells in table.cells]


#: By a word on the quirk: the name of the file, its content, and a note of the reading.
SAME: dict[str, tuple[str, str | bytes, str]] = {
    "commas": ("a.csv", PLAIN, ""),
    "semicolons": ("a.csv", PLAIN.replace(",", ";"), "the cells are separated by semicolons"),
    "tabs in .csv": ("a.csv", PLAIN.replace(",", "\t"), "the cells are separated by tabs"),
    "bars": ("a.csv", PLAIN.replace(",", "|"), "the cells are separated by bars"),
    "tabs": ("a.tsv", PLAIN.replace(",", "\t"), ""),
    "commas in .tsv": ("a.tsv", PLAIN, "the cells are separated by commas"),
    "decimal commas": ("a.csv", "name;y\na;1,5\nb;-2\n", "decimal commas in 'y'"),
    "a mark of UTF-8": ("a.csv", PLAIN.encode("utf-8-sig"), ""),
    "UTF-16": ("a.csv", PLAIN.encode("utf-16"), "read as UTF-16"),
    "UTF-16 without a mark": ("a.csv", PLAIN.encode("utf-16-le"), "read as UTF-16"),
    "UTF-16, other order": ("a.csv", PLAIN.encode("utf-16-be"), "read as UTF-16"),
    "UTF-32": ("a.csv", PLAIN.encode("utf-32"), "read as UTF-32"),
    "old line ends": ("a.csv", PLAIN.replace("\n", "\r"), ""),
    "Windows line ends": ("a.csv", PLAIN.replace("\n", "\r\n"), ""),
    "no last line end": ("a.csv", PLAIN.rstrip(), ""),
    "blank lines": ("a.csv", f"\n{PLAIN}\n\n", ""),
    "blanks in the header": ("a.csv", PLAIN.replace("name,y", " name , y"), ""),
    "empty columns at the end": ("a.csv", "name,y,,\na,1.5,,\nb,-2,,\n", ""),
    "quotes": ("a.csv", 'name,y\n"a","1.5"\n"b","-2"\n', ""),
    "gzip": ("a.csv.gz", gzip.compress(PLAIN.encode()), ""),
    "xz": ("a.csv.xz", lzma.compress(PLAIN.encode()), ""),
    "bzip2": ("a.csv.bz2", bz2.compress(PLAIN.encode()), ""),
    "zip": ("a.csv.zip", zipped(PLAIN.encode(), "a.csv"), ""),
    "zip named otherwise": ("data.zip", zipped(PLAIN.encode(), "folder/a.csv"), ""),
    "JSON lines": ("a.jsonl", '{"name": "a", "y": "1.5"}\n\n{"y": "-2", "name": "b"}\n', ""),
    "JSON lines named .json": ("a.json", '{"name": "a", "y": "1.5"}\n{"name": "b", "y": "-2"}\n', ""),
    "a list of objects": ("a.json", json.dumps([dict(zip(HEADER, row, strict=True)) for row in CELLS]), ""),
    "a list named .jsonl": ("a.jsonl", json.dumps([dict(zip(HEADER, row, strict=True)) for row in CELLS]), ""),
    "columns": ("a.json", json.dumps({"name": ["a", "b"], "y": ["1.5", "-2"]}), ""),
    "columns by row": ("a.json", json.dumps({"name": {"0": "a", "1": "b"}, "y": {"0": "1.5", "1": "-2"}}), ""),
    "columns by row, in another order": (
        "a.json",
        json.dumps({"name": {"0": "a", "1": "b"}, "y": {"1": "-2", "0": "1.5"}}),
        "",
    ),
    "a list by a name": ("a.json", json.dumps({"data": [{"name": "a", "y": "1.5"}, {"name": "b", "y": "-2"}]}), ""),
    "Parquet": ("a.parquet", parquet(name=["a", "b"], y=["1.5", "-2"]), ""),
}


@pytest.mark.parametrize("quirk", SAME)
def test_one_table_is_read_from_any_file(quirk: str, tmp_path: Path) -> None:
    name, content, note = SAME[quirk]
    table = table_of(written(tmp_path, name, content))
    assert (table.header, cells_of(table)) == (HEADER, CELLS)
    assert "; ".join(table.notes).endswith(note)
    assert bool(table.notes) == bool(note)


def test_a_row_that_a_column_of_json_lacks_is_empty_there(tmp_path: Path) -> None:
    content = {"name": {"0": "a", "1": "b"}, "y": {"2": "3", "1": "-2"}}
    table = table_of(written(tmp_path, "a.json", json.dumps(content)))
    assert table.cells == (["a", None], ["b", "-2"], [None, "3"])


#: By a word on the quirk: the name of the file, its content, and the refusal, which names the row and a remedy.
REFUSED: dict[str, tuple[str, str | bytes, str]] = {
    "a spreadsheet": ("a.xlsx", b"PK", "a.xlsx is a spreadsheet; save its sheet as CSV in the spreadsheet program"),
    "two files in an archive": ("a.zip", zipped(b"x", "a.csv", "b.csv"), "the archive holds 2 files; unpack it"),
    "no zip": ("a.csv.zip", PLAIN, "is not a complete zip file (File is not a zip file); unpack it"),
    "no xz": ("a.csv.xz", PLAIN, "is not a complete xz file"),
    "an unknown suffix": ("a.dat", PLAIN, "the suffix '.dat' is not one of .csv, .tsv, .jsonl, .json, .parquet"),
    "a ragged row": ("a.csv", PLAIN + "c\n", "row 4: 1 cells, but the header has 2; quote the cell"),
    "a ragged row of semicolons": (
        "a.csv",
        "name;y\na;1\nb;1;2\n",
        "row 3: 3 cells, but the header has 2; quote the cell that holds a",
    ),
    "an open quote": ("a.csv", PLAIN + '"c,1\n', "row 4: not valid CSV"),
    "a header only": ("a.csv", "name,y\n", "no row below the header; give a file with at least one example"),
    "a name twice": ("a.csv", "y,y\n1,2\n", "the header names 'y' more than once; rename the columns"),
    "binary": ("a.csv", b"name\0y\n\xff\n", "row 2: byte 0xff is not UTF-8 text; save the file as UTF-8"),
    "damaged UTF-8": ("a.csv", "name\né\n".encode() + b"\xff", "row 3: byte 0xff is not UTF-8 text"),
    "broken JSON": ("a.json", '[{"y": 1}, {"y": ', "not valid JSON"),
    "no objects": ("a.json", "[1, 2]", "row 1: '[1, 2]' is not a JSON object"),
    "no Parquet": ("a.parquet", PLAIN, "is not a Parquet file"),
    "empty": ("a.tsv", " \n", "the file is empty"),
}


@pytest.mark.parametrize("quirk", REFUSED)
def test_other_files_are_refused_in_a_sentence(quirk: str, tmp_path: Path) -> None:
    name, content, sentence = REFUSED[quirk]
    with pytest.raises(DataError) as error:
        table_of(written(tmp_path, name, content))
    message = str(error.value)
    assert message.startswith(str(tmp_path / name))
    assert sentence in message
    assert "; " in message
    assert "\n" not in message


def test_a_file_of_latin_text_is_read_and_the_encoding_is_stated(tmp_path: Path) -> None:
    table = table_of(written(tmp_path, "a.csv", "name,y\nMüller,1\n".encode("latin-1")))
    assert cells_of(table) == [["Müller", "1"]]
    assert table.notes == ("read as Windows-1252",)


def test_quotes_of_a_file_of_tabs_may_be_text(tmp_path: Path) -> None:
    table = table_of(written(tmp_path, "a.tsv", 'text\tlabel\n"Well" he said\t1\n6" long\t0\n'))
    assert cells_of(table) == [['"Well" he said', "1"], ['6" long', "0"]]
    assert table.notes == ("quotes are part of the text",)


QUOTED_ROWS = 'text\tlabel\nfine\t1\n"so he left\t0\nplain\t1\nhe said "\t0\n'


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_quote_of_a_file_of_tabs_never_encloses_rows(tmp_path: Path, end: str) -> None:
    table = table_of(written(tmp_path, "a.tsv", QUOTED_ROWS.replace("\n", end)))
    assert cells_of(table) == [["fine", "1"], ['"so he left', "0"], ["plain", "1"], ['he said "', "0"]]
    assert table.notes == ("quotes are part of the text",)


def test_a_quoted_cell_of_a_file_of_tabs_may_hold_a_line_break(tmp_path: Path) -> None:
    table = table_of(written(tmp_path, "a.tsv", 'text\tlabel\n"two\nlines"\t1\n"a\ttab"\t0\n'))
    assert cells_of(table) == [["two\nlines", "1"], ["a\ttab", "0"]]
    assert table.notes == ()


def test_a_column_is_not_taken_for_decimal_commas_unless_all_of_it_is_numbers(tmp_path: Path) -> None:
    table = table_of(written(tmp_path, "a.csv", "x;y;z\n1,5;1,5;1,5\n2;a,b;3.5\n"))
    assert cells_of(table) == [["1.5", "1,5", "1,5"], ["2", "a,b", "3.5"]]
    assert table.notes[-1] == "decimal commas in 'x'"


def test_objects_may_lack_keys_or_spell_them_otherwise(tmp_path: Path) -> None:
    table = table_of(
        written(tmp_path, "a.jsonl", '{"text": "a", "Label": 1}\n{"TEXT": "b"}\n{"text": "c", "more": [2]}\n')
    )
    assert table.header == ("text", "Label", "TEXT", "more")
    assert [cells[:2] for cells in table.cells] == [["a", 1], ["b", None], ["c", None]]
    assert table.rows == (1, 2, 3)


def test_rows_are_lines_of_text_numbers_of_other_records_and_indices_of_a_data_set(tmp_path: Path) -> None:
    assert table_of(written(tmp_path, "a.csv", '\nx,y\n"a\nb",1\nc,2\n')).rows == (3, 5)
    assert table_of(written(tmp_path, "a.parquet", parquet(x=[1, 2]))).rows == (1, 2)
    assert table_of(datasets.Dataset.from_dict({"x": [1, 2]})).rows == (0, 1)


def test_a_folder_of_a_data_set_is_read(tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict(
        {"text": ["a", "b", "c"], "label": [1, 0, -1]},
        features=datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
        ),
    )
    made.save_to_disk(str(tmp_path / "one"))
    assert cells_of(table_of(tmp_path / "one")) == [["a", "yes"], ["b", "no"], ["c", None]]
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(DataError, match=r"two is a folder; give one of its data sets: test, train"):
        table_of(tmp_path / "two")
    assert cells_of(table_of(tmp_path / "two" / "train"))[0] == ["a", "yes"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"is a folder; give the path of a data file"):
        table_of(tmp_path / "empty")


@pytest.mark.parametrize("module", ["pyarrow", "datasets"])
def test_an_optional_dependency_is_named(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.Dataset.from_dict({"x": [1]}).save_to_disk(str(tmp_path / "one"))
    source: dict[str, Callable[[], Path]] = {
        "pyarrow": lambda: written(tmp_path, "a.parquet", parquet(x=[1])),
        "datasets": lambda: tmp_path / "one",
    }
    path = source[module]()
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ImportError, match=f"needs {module}.*pip install {module}"):
        table_of(path)
