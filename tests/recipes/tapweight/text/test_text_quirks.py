"""Tables of texts as people have them: the right labels and splits, or one sentence with a remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from text_cases import encoder
from torch.nn.functional import binary_cross_entropy_with_logits

from mlopt.recipes.tapweight.files import DataError
from mlopt.recipes.tapweight.text.chunks import chunked
from mlopt.recipes.tapweight.text.data import Texts, read_corpus, read_table
from mlopt.recipes.tapweight.text.splitting import divided, meanings, remarks_of
from mlopt.recipes.tapweight.text.task import TextTask

CASES = Path(__file__).parents[1] / "cases" / "text"


def task_of(texts: Texts, **options: Any) -> TextTask:
    labels = meanings(texts)
    splits = {split: texts.subset(rows) for split, rows in divided(texts, labels).items()}
    return TextTask(splits, encoder().collate, classes=labels[0].classes, **options)


def objects_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (CASES / name).read_text().splitlines()]


def test_rows_without_text_are_left_out_and_counted_also_if_one_file_is_divided() -> None:
    texts = read_table(CASES / "empty_rows.jsonl")
    empty = [row for row, record in enumerate(objects_of("empty_rows.jsonl"), start=1) if not record["text"]]
    assert [each.row for each in texts.skipped] == empty
    assert len(empty) == 12
    assert remarks_of(texts, meanings(texts))[0].startswith(
        "48 texts of empty_rows.jsonl; 12 skipped: row 1 (the text is empty)"
    )


def test_a_rare_class_is_in_the_training_texts_and_the_others_are_scored() -> None:
    task = task_of(read_table(CASES / "rare_class.jsonl"))
    assert task.classes == ("a", "b", "rare")
    assert [sum(example["label"] == 2 for example in part) for part in task.splits.values()] == [1, 0, 0]
    assert 0 <= task.score(encoder(), task.head(encoder()), "valid") <= 1


@pytest.mark.parametrize(
    ("name", "classes", "column"),
    [("multi_label.jsonl", ("0", "1", "2"), "label"), ("multi_label_names.jsonl", ("bio", "cs"), "labels")],
)
def test_lists_are_several_classes_at_once(name: str, classes: tuple[str, ...], column: str) -> None:
    texts = read_table(CASES / name)
    task = task_of(texts)
    assert (task.form, task.classes, task.metric_name, task.label_name) == ("several", classes, "micro_f1", column)
    assert task.subject() == f"classification into any of {', '.join(classes)}"
    by_text = {record["text"]: record[column] for record in objects_of(name)}
    for example in task.splits["train"]:
        labels = by_text[example["text"]]
        expected = labels if classes[0] == "0" else [float(name in labels) for name in classes]
        assert example["label"] == expected
    own = encoder()
    batch = task.collate(list(task.splits["train"])[:4])
    outputs = task.outputs(own, task.head(own), batch)
    expected = binary_cross_entropy_with_logits(outputs, batch["label"], reduction="none").mean(1)
    torch.testing.assert_close(task.losses(outputs, batch), expected)
    torch.testing.assert_close(task.columns(batch), batch["label"].double())
    with pytest.raises(ValueError, match=r"they must be \(B, C\) and \(B, C\)"):
        task.losses(outputs[:, :1], batch)


def test_minus_one_is_asked_about_and_left_out_if_it_means_no_label() -> None:
    file = CASES / "minus_one_unlabelled.jsonl"
    with pytest.raises(
        DataError,
        match=r"column 'label': -1 occurs with 0 and 1 \(6 of 60 rows, the first in row 1\); give --missing -1",
    ):
        task_of(read_table(file))
    texts = read_table(file, missing=["-1"])
    assert (len(texts), len(texts.skipped), texts.skipped[1].reason) == (54, 6, "the label is missing")
    assert task_of(texts).classes == ("0", "1")


def test_tabs_a_list_and_numbers_in_quotes() -> None:
    texts = read_table(CASES / "sentence_label.tsv")
    assert texts[0] == {"text": "The cell binds the cell in case 0.", "label": "0"}
    assert task_of(texts).classes == ("0", "1")
    array = read_table(CASES / "array.json")
    assert array[2] == {"text": "This method explains an enzyme in case 2.", "label": 2}
    assert task_of(array).classes == ("0", "1", "2")
    scores = task_of(read_table(CASES / "scores_as_strings.jsonl"), metric="rmse")
    assert (scores.kind, scores.greater_is_better) == ("regression", False)
    assert {example["label"] for part in scores.splits.values() for example in part} <= {k / 2 for k in range(12)}


def test_whole_scores_are_classes_only_with_a_line_that_states_it() -> None:
    rows = [{"text": f"text {k}", "label": k % 6} for k in range(60)]
    whole = Texts(examples=tuple(rows), rows=tuple(range(60)), source="a")
    stated = "label: 6 classes, 0, 1, 2, 3, 4, 5; give --kind regression if these are numbers to predict"
    parts = {split: whole.subset(indices) for split, indices in divided(whole, meanings(whole)).items()}
    assert TextTask(parts, encoder().collate).remarks[0] == stated
    assert remarks_of(whole, meanings(whole)) == [stated]
    numbers = TextTask(parts, encoder().collate, kind="regression")
    assert (numbers.form, numbers.remarks) == ("numbers", [])


def test_long_documents_are_divided_and_no_word_is_lost() -> None:
    texts, collate = read_corpus(CASES / "long_documents.jsonl"), encoder().collate
    chunks = chunked(texts, collate)
    assert max(collate.lengths(texts)) == 17  # more than 16
    assert max(collate.lengths(chunks)) <= 16
    assert [word for chunk in chunks for word in chunk["text"].split()] == [
        w for text in texts for w in text["text"].split()
    ]
    assert chunks.summary().endswith("; 20 documents are longer than 16 tokens and are divided")


def test_a_chunk_holds_as_many_sentences_as_fit_and_long_sentences_are_halved() -> None:
    collate = encoder().collate
    text = Texts(examples=({"text": "Good is good. Bad is bad. Fine is fine. Poor is poor."},), rows=(1,), source="a")
    assert [chunk["text"] for chunk in chunked(text, collate)] == [
        "Good is good. Bad is bad. Fine is fine.",
        "Poor is poor.",
    ]
    long = Texts(examples=({"text": "good " * 30}, {"text": "bad"}), rows=(1, 2), source="a")
    made = chunked(long, collate)
    assert made.rows[-1] == 2
    # A chunk holds 14 words beside the two special tokens, so 30 words are halved twice, and 7 and 8 stay apart.
    assert [len(chunk["text"].split()) for chunk in made] == [7, 8, 7, 8, 1]
    short = Texts(examples=({"text": "good"},), rows=(1,), source="a")
    assert chunked(short, collate) is short


def test_texts_that_are_listed_twice_stay_together_and_contradictions_are_named(tmp_path: Path) -> None:
    rows = [(f"text {k}", "ab"[k % 2]) for k in range(30)] + [("text 0", "b"), (" text 1 ", "b")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in rows))
    texts = read_table(tmp_path / "a.jsonl")
    splits = divided(texts, meanings(texts), "random")
    assert all(sum({first, second} <= set(own) for own in splits.values()) == 1 for first, second in ((0, 30), (1, 31)))
    assert remarks_of(texts, meanings(texts)) == [
        "label: two classes, a, b; b is the positive one",
        "texts of a.jsonl listed more than once: 2",
        "of these, with different labels: 1; text 0 in rows 1, 31 (label: a, b)",
    ]


def test_a_data_set_and_its_folder_are_read(tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [0.5, 1.5]})
    made.save_to_disk(str(tmp_path / "folder"))
    expected = [{"text": "a", "label": 0.5}, {"text": "b", "label": 1.5}]
    assert list(read_table(made)) == list(read_table(tmp_path / "folder")) == expected
    assert [example["text"] for example in read_corpus(tmp_path / "folder")] == ["a", "b"]


def test_a_corpus_may_have_one_column_of_any_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("abstract\none\ntwo\n")
    assert [example["text"] for example in read_corpus(tmp_path / "a.csv")] == ["one", "two"]
    (tmp_path / "b.csv").write_text("abstract,id\none,1\n")
    with pytest.raises(
        DataError, match=r"b\.csv: no column 'text'; available: 'abstract', 'id'; name the column of the texts 'text'"
    ):
        read_corpus(tmp_path / "b.csv")
