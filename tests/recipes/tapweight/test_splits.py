"""Splits: stratified, in groups, by a column and by a file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlopt.recipes.tapweight.files import DataError
from mlopt.recipes.tapweight.splits import folder_split, listed_split, named_split, random_split, stratified_split
from mlopt.recipes.tapweight.tables import Table


def test_without_repeated_keys_groups_change_nothing() -> None:
    assert random_split(100, seed=3, groups=[f"m{k}" for k in range(100)]) == random_split(100, seed=3)


@settings(max_examples=60, deadline=None)
@given(keys=st.lists(st.integers(0, 25), min_size=30, max_size=60), seed=st.integers(0, 9), stratified=st.booleans())
def test_examples_of_a_key_stay_together(keys: list[int], seed: int, stratified: bool) -> None:
    try:
        splits = (
            stratified_split([key % 2 for key in keys], seed=seed, groups=keys)
            if stratified
            else random_split(len(keys), seed=seed, groups=keys)
        )
    except DataError:
        return
    assert sorted(index for indices in splits.values() for index in indices) == list(range(len(keys)))
    owners: dict[int, set[str]] = {}
    for name, indices in splits.items():
        for index in indices:
            owners.setdefault(keys[index], set()).add(name)
    assert all(len(names) == 1 for names in owners.values())


@pytest.mark.parametrize("seed", range(3))
def test_each_class_has_its_share_of_each_split(seed: int) -> None:
    classes = ["a"] * 100 + ["b"] * 50 + ["c"] * 20
    splits = stratified_split(classes, (0.6, 0.2, 0.2), seed)
    counts = {name: Counter(classes[index] for index in indices) for name, indices in splits.items()}
    assert counts == {
        "train": {"a": 60, "b": 30, "c": 12}, "valid": {"a": 20, "b": 10, "c": 4}, "test": {"a": 20, "b": 10, "c": 4},
    }  # fmt: skip
    assert splits != stratified_split(classes, (0.6, 0.2, 0.2), seed + 10)


def test_a_class_of_one_example_is_in_train_and_small_classes_fill_all_splits() -> None:
    for seed in range(40):
        classes = ["rare", *(name for name in "abcdefg" for _ in range(seed % 5 + 3))]
        assert 0 in stratified_split(classes, (0.4, 0.3, 0.3), seed)["train"]
    many = stratified_split([str(k // 4) for k in range(160)])
    assert [len(indices) for indices in many.values()] == pytest.approx([128, 16, 16], abs=4)


def test_rare_combinations_of_labels_leave_no_split_empty() -> None:
    """In a class, the first example goes to train; of 40 combinations of one example each, no other split would get any."""
    rare = stratified_split(list(range(40)), combined=True)
    assert [len(indices) for indices in rare.values()] == [32, 4, 4]
    pairs = ["ab"] * 20 + ["cd"] * 10 + list(range(10))
    splits = stratified_split(pairs, (0.6, 0.2, 0.2), combined=True)
    counts = {name: Counter(pairs[index] for index in indices) for name, indices in splits.items()}
    assert [counts[name]["ab"] for name in splits] == pytest.approx([12, 4, 4], abs=1)
    assert [counts[name]["cd"] for name in splits] == pytest.approx([6, 2, 2], abs=1)


def test_a_column_names_the_splits() -> None:
    names = ("Train", "dev", " test ", "x", "training", "validation")
    table = Table(source="a.csv", header=("s",), rows=tuple(range(2, 8)), cells=tuple((name,) for name in names))
    # Record 3 was left out.
    assert named_split(table, "s", [0, 1, 2, 4, 5]) == {"train": [0, 3], "valid": [1, 4], "test": [2]}
    with pytest.raises(DataError, match=r"a\.csv, row 5, column 's': 'x' is not train, valid or test; correct it"):
        named_split(table, "s", range(6))
    with pytest.raises(DataError, match="no row is in the test split; assign rows to it, or leave out --split-column"):
        named_split(table, "s", [0, 1])
    with pytest.raises(DataError, match="no column 'part'; available: 's'; name the column with --split-column"):
        named_split(table, "part", [0])


def test_a_file_lists_the_splits(tmp_path: Path) -> None:
    file = tmp_path / "splits.json"
    file.write_text(json.dumps({"train": [5, 0, 2], "valid": [3], "test": [1]}))
    # Records 2 and 4 were left out.
    assert listed_split(file, "a.csv", [0, 1, 3, 5]) == {"train": [3, 0], "valid": [2], "test": [1]}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[1]", "give lists of row numbers by the names 'train', 'valid' and 'test', or leave out --splits"),
        ('{"train": [0], "valid": [1]}', "give lists of row numbers"),
        ('{"train": [0, 1], "valid": [1], "test": [2]}', "row 1 is listed twice"),
        (
            '{"train": [0], "valid": [9], "test": [2]}',
            r"a\.csv has no row 9 \(the first is 0\); give the splits\.json of a run on it with --splits",
        ),
        ('{"train": [0], "valid": [], "test": [2]}', r"no row of a\.csv is in valid"),
        ("{", "not valid JSON"),
    ],
)
def test_another_list_is_refused(content: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "splits.json").write_text(content)
    with pytest.raises(DataError, match=sentence):
        listed_split(tmp_path / "splits.json", "a.csv", [0, 1, 2])


def test_a_missing_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No such file or directory; give the path of a splits\.json with --splits"):
        listed_split(tmp_path / "none.json", "a.csv", [0])


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("train", "validation", "test"), {"train": "train", "valid": "validation", "test": "test"}),
        (("Training", "dev", "test", "unsupervised"), {"train": "Training", "valid": "dev", "test": "test"}),
        (("train", "test"), None),
        (("train", "dev", "val", "test"), None),
    ],
)
def test_a_folder_holds_the_splits(names: tuple[str, ...], splits: dict[str, str] | None, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").touch()
    if splits is not None:
        assert list(folder_split(tmp_path).items()) == [(split, tmp_path / name) for split, name in splits.items()]
        return
    first = min(names)
    with pytest.raises(
        DataError, match=rf"holds the data sets {first}, .*, not one each of .* such as .*/{first}, which"
    ):
        folder_split(tmp_path)
