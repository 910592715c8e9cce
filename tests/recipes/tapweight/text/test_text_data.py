"""Reading text: files, data sets and GLUE, and refusals."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from text_cases import write_glue

from mlopt.recipes.tapweight.files import DataError
from mlopt.recipes.tapweight.text.data import Texts, from_dataset, read_corpus, read_table
from mlopt.recipes.tapweight.text.glue_tasks import GLUE, glue


def write(folder: Path, name: str, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return folder / name


def objects(*records: Any) -> str:
    return "\n".join(json.dumps(record) for record in records) + "\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "one\n\n  two words \nthree\n"),
        ("a.txt.gz", "one\r\n\r\ntwo words\r\nthree"),
        ("a.csv", 'id,Text\n1,one\n2,"two words"\n3,three\n'),
        ("a.jsonl", objects({"TEXT": "one"}, {"Text": "two words"}, {"text": "three", "Text": "four"})),
        ("a.jsonl.gz", objects({"text": "one", "label": 3}, {"text": "two words"}, {"text": "three"})),
    ],
)
def test_a_corpus_is_read_from_lists_and_tables(name: str, content: str, tmp_path: Path) -> None:
    texts = read_corpus(write(tmp_path, name, content))
    assert list(texts) == [{"text": "one"}, {"text": "two words"}, {"text": "three"}]
    assert texts.summary() == f"3 texts of {name}"
    assert len(read_corpus(tmp_path / name, limit=2)) == 2


def test_rows_are_the_lines_of_the_file(tmp_path: Path) -> None:
    assert read_corpus(write(tmp_path, "a.txt", "one\n\ntwo\n")).rows == (1, 3)
    assert read_table(write(tmp_path, "a.csv", 'text,label\n"a\nb",x\nc,y\n')).rows == (2, 4)
    assert read_table(write(tmp_path, "a.jsonl", "\n" + objects({"text": "a", "label": 1}))).rows == (2,)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"text": "a", "label": 1}, {"text": "a", "label": 1}),
        ({"Text": "a", "Label": 1}, {"text": "a", "label": 1}),
        ({"Text": "b", "text": "a", "LABEL": 1}, {"text": "a", "label": 1}),
        ({"text_a": "a", "text_b": "b", "label": "x"}, {"text": "a", "text_b": "b", "label": "x"}),
        ({"id": 3, "sentence": "a", "label": 0.5}, {"text": "a", "label": 0.5}),
        ({"sentence1": "a", "sentence2": "b", "label": True}, {"text": "a", "text_b": "b", "label": True}),
    ],
)
def test_the_usual_columns_are_found(columns: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    assert list(read_table(write(tmp_path, "a.jsonl", objects(columns)))) == [expected]


def test_columns_can_be_named(tmp_path: Path) -> None:
    file = write(tmp_path, "a.csv", "premise,hypothesis,text,gold\na,b,c,1\n")
    assert list(read_table(file, text=("premise", "hypothesis"), label="gold")) == [
        {"text": "a", "text_b": "b", "label": "1"}
    ]


def test_empty_texts_are_left_out_and_reported_or_refused(tmp_path: Path) -> None:
    file = write(tmp_path, "a.csv", "text,label\na,1\n,1\n  ,0\nb,0\n")
    texts = read_table(file)
    assert [example["text"] for example in texts] == ["a", "b"]
    assert texts.summary() == "2 texts of a.csv; 2 skipped: row 3 (the text is empty), row 4 (the text is empty)"
    with pytest.raises(DataError, match=r"a\.csv, row 3: the text is empty; correct it"):
        read_table(file, strict=True)
    pairs = write(tmp_path, "b.jsonl", objects(*({"text_a": "a", "text_b": b, "label": 1} for b in ("b", "", None))))
    assert len(read_table(pairs)) == 1


def test_half_a_character_is_left_out_and_reported_or_refused(tmp_path: Path) -> None:
    """JSON writes a character beyond the first 65,536 in two parts; a truncated text has one of them."""
    file = write(
        tmp_path, "a.jsonl", "\n".join(f'{{"text": "{x}", "label": 1}}' for x in ("a", r"b \ud83d", r"c \ud83d\ude00"))
    )
    fault = r"the text has '\ud83d', half of a character"
    for texts in (read_table(file), read_corpus(file)):
        assert [example["text"] for example in texts] == ["a", "c \U0001f600"]
        assert texts.summary() == f"2 texts of a.jsonl; 1 skipped: row 2 ({fault})"
    with pytest.raises(DataError) as error:
        read_table(file, strict=True)
    assert str(error.value) == f"{file}, row 2: {fault}; correct it, or leave out --strict"


def test_a_document_may_be_longer_than_csv_allows_by_itself(tmp_path: Path) -> None:
    limit, long = csv.field_size_limit(), "word " * 40_000
    assert len(long) > limit
    assert read_corpus(write(tmp_path, "a.csv", f"text\na\n{long}\nb\n"))[1] == {"text": long}
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", "text,class\na,1\n", "no column 'label'; available: 'text', 'class'"),
        ("a.csv", "texts,label\na,1\n", "no column 'text'; available: 'texts', 'label' (did you mean 'texts'?)"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": \n', "a.jsonl, row 2: not valid JSON"),
        ("a.jsonl", '["a", 1]\n', "a.jsonl, row 1: '[\"a\", 1]' is not a JSON object"),
        ("a.jsonl", objects({"text": 3, "label": 1}), "a.jsonl, row 1: 3 is not text; give strings"),
        (
            "a.jsonl",
            objects({"text": "a", "label": None}),
            "a.jsonl: no row is a text; row 1: the label is missing; give at least 1",
        ),
        ("a.csv", "text,label\na,\n", "a.csv: no row is a text; row 2: the label is missing"),
        ("a.csv", "text,label\n,1\n", "no row is a text; row 2: the text is empty; give at least 1"),
        ("a.csv", "text,label\n", "no row below the header"),
        ("a.csv", "text,label\na,1,2\n", "a.csv, row 2: 3 cells, but the header has 2"),
        ("a.jsonl", "\n\n", "the file is empty"),
        ("a.parquet", "x", "a.parquet is not a Parquet file"),
        ("a.xlsx", "x", "a.xlsx is a spreadsheet; save its sheet as CSV in the spreadsheet program"),
        (
            "a.doc",
            "x",
            "the suffix '.doc' is not one of .csv, .tsv, .jsonl, .json, .parquet, also with .gz, .xz, .bz2, .zip",
        ),
    ],
)
def test_an_unreadable_file_is_refused_in_a_sentence(
    name: str, content: str | bytes, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as error:
        read_table(write(tmp_path, name, content))
    assert str(tmp_path / name) in str(error.value)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unusable_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a corpus of one text is too small"):
        read_corpus(write(tmp_path, "a.txt", "one\n"))
    with pytest.raises(FileNotFoundError, match=r"b\.txt: no such file"):
        read_corpus(tmp_path / "b.txt")
    (tmp_path / "c.txt.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="not a complete gzip file"):
        read_corpus(tmp_path / "c.txt.gz")
    with pytest.raises(ValueError, match="limit=1: a corpus needs at least 2 texts"):
        read_corpus(tmp_path / "a.txt", limit=1)


def test_the_corpus_of_a_task_has_each_of_its_texts_once(tmp_path: Path) -> None:
    records = [{"text_a": a, "text_b": b, "label": 1} for a, b in (("x", "y"), ("y", "z"), ("x", "x"))]
    own = read_table(write(tmp_path, "a.jsonl", objects(*records))).unlabelled()
    assert sorted(example["text"] for example in own) == ["x", "y", "z"]
    assert all(example.keys() == {"text"} for example in own)


def dataset(texts: list[str], labels: list[int], names: tuple[str, str] = ("text", "label")) -> datasets.Dataset:
    text, label = names
    features = {text: datasets.Value("string"), label: datasets.ClassLabel(names=["no", "yes"])}
    return datasets.Dataset.from_dict({text: texts, label: labels}, features=datasets.Features(features))


def test_labels_of_a_data_set_become_the_names_of_its_classes() -> None:
    made = dataset(["a", "", "c"], [1, 0, 0])
    texts = from_dataset(made, name="made")
    assert list(texts) == [{"text": "a", "label": "yes"}, {"text": "c", "label": "no"}]
    assert texts.summary() == "2 texts of made; 1 skipped: row 1 (the text is empty)"
    assert list(from_dataset(made, label=None)) == [{"text": "a"}, {"text": "c"}]
    with pytest.raises(DataError, match="made: no column 'gold'; available: 'text', 'label'"):
        from_dataset(made, label="gold", name="made")


def test_the_columns_of_a_data_set_are_found_in_any_case() -> None:
    texts = from_dataset(dataset(["a", "b"], [1, 0], names=("Text", "Label")))
    assert list(texts) == [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}]


def test_a_negative_class_of_a_data_set_is_a_missing_label() -> None:
    made = dataset(["a", "b"], [1, -1])
    assert from_dataset(made, name="made").summary() == "1 texts of made; 1 skipped: row 1 (the label is missing)"
    with pytest.raises(DataError, match="made, row 1: the label is missing; correct it, or leave out --strict"):
        from_dataset(made, name="made", strict=True)
    assert len(from_dataset(made, label=None)) == 2


@pytest.mark.parametrize("name", ["cola", "stsb", "mnli"])
def test_a_task_of_glue_is_read_from_the_cache_of_datasets(name: str, tmp_path: Path) -> None:
    task, count = GLUE[name], 40
    numbers = name == "stsb"
    label = datasets.Value("float32") if numbers else datasets.ClassLabel(names=["a", "b", "c"])
    features = datasets.Features({**{column: datasets.Value("string") for column in task.text}, "label": label})
    columns: dict[str, list[Any]] = {column: [f"{column} {k}" for k in range(count)] for column in task.text}
    columns["label"] = [k / 8 for k in range(count)] if numbers else [k % 3 for k in range(count)]
    write_glue(tmp_path, name, columns, features)
    splits, metric = glue(name, cache_dir=tmp_path)
    assert metric == task.metric
    assert {split: len(texts) for split, texts in splits.items()} == {"train": 36, "valid": 4, "test": 40}
    seen = [example["text"] for split in ("train", "valid") for example in splits[split]]
    assert sorted(seen) == sorted(columns[task.text[0]])
    assert splits["test"][1] == {
        "text": f"{task.text[0]} 1",
        **({"text_b": f"{task.text[1]} 1"} if len(task.text) == 2 else {}),
        "label": 0.125 if numbers else "b",
    }
    assert [e["text"] for e in glue(name, seed=1, cache_dir=tmp_path)[0]["valid"]] != [
        e["text"] for e in splits["valid"]
    ]


def test_an_unknown_task_of_glue_or_one_that_cannot_be_fetched_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"dataset='coal' is not a task of GLUE; available: .* \(did you mean 'cola'\?\)"
    ):
        glue("coal")
    with pytest.raises(DataError, match=r"GLUE's rte cannot be fetched .*; pass the files with --train instead"):
        glue("rte", cache_dir=tmp_path)


def test_a_changed_text_changes_the_checksum_and_targets_do_not() -> None:
    first, second = (
        Texts(examples=({"text": "good"}, {"text": text}), rows=(0, 1), source="made") for text in ("bad", "poor")
    )
    before = first.checksum()
    first[0]["keywords"] = 1.0
    assert first.checksum() == before != second.checksum()
