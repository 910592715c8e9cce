"""The meaning of columns of labels."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mlopt.recipes.tapweight.files import DataError
from mlopt.recipes.tapweight.labels import Labels, labels_of, meanings_of


def of(*cells: Any, **options: Any) -> Labels:
    return labels_of("a.csv", "y", list(enumerate(cells, start=2)), **options)


@pytest.mark.parametrize(
    ("cells", "form", "classes"),
    [
        (("0", "1", ""), "binary", ("0", "1")),
        ((1, 1, 1), "binary", ("0", "1")),
        (("-1", "1"), "binary", ("-1", "1")),
        # One number in several spellings is one class, and a sign does not change the order.
        (("+1", "-1"), "binary", ("-1", "1")),
        (("1", "1.00", "+1", "1.", "0", "-0"), "binary", ("0", "1")),
        (("+", "-"), "binary", ("-", "+")),
        (("Active", "Inactive"), "binary", ("Inactive", "Active")),
        (("yes", "no"), "binary", ("no", "yes")),
        ((True, False), "binary", ("False", "True")),
        (("b", "a"), "binary", ("a", "b")),
        (("0", "1", "2"), "classes", ("0", "1", "2")),
        (("10", "9", "2.0"), "classes", ("2", "9", "10")),
        (("red", "green", "NA"), "classes", ("NA", "green", "red")),
        (("0", "1", "NA", "nan"), "binary", ("0", "1")),
        (("0.5", "1", "null"), "numbers", ()),
        (([0, 1], [1, 1]), "several", ("0", "1")),
        (("[0, 1, 0]", "[1, 0, 0]"), "several", ("0", "1", "2")),
        (("['b']", "['a', 'b']"), "several", ("a", "b")),
        ((["x"], []), "several", ("x",)),
        (([3], [7, 3]), "several", ("3", "7")),
    ],
)
def test_the_form_follows_from_the_cells(cells: tuple[Any, ...], form: str, classes: tuple[str, ...]) -> None:
    if classes == ("x",):
        with pytest.raises(DataError, match="the lists hold only the class 'x'; give at least two"):
            of(*cells)
        return
    assert (of(*cells).form, of(*cells).classes) == (form, classes)


def test_whole_numbers_are_classes_if_there_are_few_of_them() -> None:
    few, many = [k % 4 for k in range(40)], [k % 21 for k in range(40)]
    assert of(*few).form == "classes"
    assert of(*many).form == "numbers"
    assert of(*[k % 21 for k in range(420)]).form == "classes"
    assert of(*few, rows_per_class=11).form == "numbers"
    assert of(*few, kind="regression").form == "numbers"
    assert len(of(*many, kind="classification").classes) == 21


def test_cells_become_numbers() -> None:
    numbers = of("0.5", "-1e3", "")
    assert [numbers.number(cell) for cell in ("0.5", "-1e3", 2)] == [0.5, -1000.0, 2.0]
    assert all(math.isnan(numbers.number(cell)) for cell in ("", None, "NA", math.nan))
    classes = of("b", "a", "c")
    assert [classes.index(cell) for cell in ("a", " b ", "c")] == [0, 1, 2]
    several = of(["b"], ["a", "b"])
    assert [several.indicators(cell) for cell in (["b"], ["a"], "['b', 'a']", [])] == [[0, 1], [1, 0], [1, 1], [0, 0]]
    assert of([0, 1, 1], [1, 0, 0]).indicators([0, 1, 1]) == [0.0, 1.0, 1.0]
    missing = of("0", "1", "-9", missing=("-9",))
    assert (missing.form, missing.is_missing("-9"), missing.is_missing(-9.0)) == ("binary", True, True)


def test_minus_one_beside_0_and_1_is_asked_about_once() -> None:
    with pytest.raises(DataError) as error:
        of("1", "0", "-1", "-1")
    assert str(error.value) == (
        "a.csv, column 'y': -1 occurs with 0 and 1 (2 of 4 rows, the first in row 4); give --missing -1 if it means that there "
        "is no label, or --kind classification if it is a class"
    )
    assert of("1", "0", "-1", missing=("-1",)).classes == ("0", "1")
    assert of("1", "0", "-1", kind="classification").classes == ("-1", "0", "1")
    assert of("1", "0", "-1", kind="regression").form == "numbers"


@pytest.mark.parametrize(
    ("cells", "options", "sentence"),
    [
        (
            ("1.5", ">100", "<2"),
            {},
            "row 3, column 'y': '>100' is a bound, not a number (such cells: 2); write a number",
        ),
        (("1.5", ">100", "<2"), {}, "or read them as missing with --missing '>100' '<2'"),
        (
            ("1", "high"),
            {},
            "row 3, column 'y': 'high' is not a number; correct it, or read it as missing with --missing 'high'",
        ),
        (("a", "b"), {"kind": "regression"}, "row 2, column 'y': 'a' is not a number"),
        (
            ("1", "2.5"),
            {"kind": "classification"},
            "row 3, column 'y': '2.5' is a number, not the name of a class; leave out",
        ),
        (("", "NA"), {}, "column 'y': no row has a label; name another column with --labels"),
        (
            ([1, 0], "1"),
            {},
            "row 3, column 'y': '1' is not a list, but others are; write a list of classes in each row",
        ),
    ],
)
def test_other_columns_are_refused(cells: tuple[Any, ...], options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError) as error:
        of(*cells, **options)
    assert sentence in str(error.value)


def test_one_column_of_one_class_among_others_is_named() -> None:
    columns = [("a", [(2, "yes"), (3, "no")]), ("b", [(2, "same"), (3, "same")])]
    with pytest.raises(
        DataError,
        match=r"a\.csv, column 'b': the only class is 'same', so nothing can be learned; name the other columns with --labels",
    ):
        meanings_of("a.csv", columns)


def test_the_kind_is_stated() -> None:
    assert of("Active", "Inactive").summary() == "y: two classes, Inactive, Active; Active is the positive one"
    assert of("0", "1", "2").summary() == "y: 3 classes, 0, 1, 2"
    assert of(["a"], ["b"]).summary() == "y: any number of 2 classes, a, b"
    assert of("0.5").summary() == "y: numbers"


def test_classes_that_may_be_numbers_are_stated_with_the_option_that_changes_them() -> None:
    scores, ages = [k % 6 for k in range(60)], [18 + k % 13 for k in range(60)]
    remedy = "; give --kind regression if these are numbers to predict"
    assert of(*scores).remarks() == [f"y: 6 classes, 0, 1, 2, 3, 4, 5{remedy}"]
    assert of(*ages).remarks() == [f"y: 13 classes, {', '.join(map(str, range(18, 31)))}{remedy}"]
    assert of("2", "3").remarks() == [f"y: two classes, 2, 3; 3 is the positive one{remedy}"]
    assert of(*scores, kind="classification").remarks() == ["y: 6 classes, 0, 1, 2, 3, 4, 5"]
    assert of("-1", "1").remarks() == ["y: two classes, -1, 1; 1 is the positive one"]
    assert of("a", "b").remarks() == ["y: two classes, a, b; b is the positive one"]
    for clear in (of("0", "1"), of(*scores, kind="regression"), of(*scores, 2.5)):
        assert clear.remarks() == []
