"""The meaning of a column of labels: two classes, several, several at once, or numbers; derived from its cells and stated."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import attrs
import numpy as np

from mlopt.validation import shown

from .cells import MISSING, dressed_number, entries_of, is_bound, is_empty, is_indicator, name_of, number_of
from .files import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Form", "Kind", "Labels", "are_classes", "check_varied", "labels_of", "meanings_of"]

#: The choice of a user.
Kind = Literal["classification", "regression"]
Form = Literal["binary", "classes", "several", "numbers"]

#: Names of the class that a score should be high for, in any case.
_POSITIVE = frozenset(("1", "+", "active", "hit", "pos", "positive", "t", "toxic", "true", "y", "yes"))
#: Whole numbers with more distinct values are classes only if there are this many rows for each.
_FEW_CLASSES, _ROWS_OF_MANY = 20, 20
#: Numbers are learned in single precision.
_LARGEST = float(np.finfo(np.float32).max)
_NAMED = 3


@attrs.frozen
class Labels:
    """The meaning of the cells of a column.

    Args:
        name: the column.
        form: "binary" for two classes, "classes" for more, "several" for any number of classes at once, "numbers".
        classes: the names of the classes; of two, the positive one is the second.
        missing: cells that stand for no label, beside empty ones.
        assumed: True if the classes are whole numbers that could be labels of a regression, and the user did not decide.
    """

    name: str
    form: Form
    classes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    assumed: bool = False

    def is_missing(self, cell: Any) -> bool:
        """Return True if a cell holds no label."""
        if is_empty(cell, self.missing):
            return True
        value = number_of(cell) if self.form == "numbers" or _are_whole(self.classes) else None
        return value is not None and math.isnan(value)

    def number(self, cell: Any) -> float:
        """Return the number of a cell, NaN if it is missing.

        Raises:
            DataError: the cell is not a finite number.
        """
        if self.is_missing(cell):
            return math.nan
        value = number_of(cell)
        if value is None:
            raise DataError(f"{shown(cell)} is not a number")
        if math.isinf(value):
            raise DataError(f"{shown(cell)} is not finite")
        return value

    def index(self, cell: Any) -> int:
        """Return the index of a cell's class.

        Raises:
            DataError: the cell is not one of the classes.
        """
        if (name := name_of(cell)) not in self.classes:
            raise DataError(f"{shown(name)} is not one of the classes, {', '.join(self.classes)}")
        return self.classes.index(name)

    def value(self, cell: Any) -> float:
        """Return the number of a cell, or the index of its class; NaN if it is missing.

        Raises:
            DataError: as `number` and `index`, or the number is too large for single precision.
        """
        if self.form != "numbers":
            return math.nan if self.is_missing(cell) else float(self.index(cell))
        value = self.number(cell)
        if abs(value) > _LARGEST:
            raise DataError(f"{shown(cell)} is too large for float32 (rescale the column)")
        return value

    def indicators(self, cell: Any) -> list[float]:
        """Return a 1 for each class that a cell of several holds, 0 for the others.

        Raises:
            DataError: the cell is not a list, or holds an unknown class.
        """
        entries = entries_of(cell)
        if entries is None:
            raise DataError(f"{shown(cell)} is not a list of classes")
        if is_indicator(entries) and self.classes == _positions(len(entries)):
            return [float(entry) for entry in entries]
        held = {self.index(entry) for entry in entries}
        return [float(k in held) for k in range(len(self.classes))]

    def summary(self) -> str:
        """Return a clause on the column: its name and its kind."""
        names = ", ".join(self.classes)
        if self.form == "binary":
            return f"{self.name}: two classes, {names}; {self.classes[1]} is the positive one"
        if self.form == "classes":
            return f"{self.name}: {len(self.classes)} classes, {names}"
        if self.form == "several":
            return f"{self.name}: any number of {len(self.classes)} classes, {names}"
        return f"{self.name}: numbers"

    def remarks(self) -> list[str]:
        """Return the sentence that states the classes, with a remedy if they are assumed; none for numbers, and for 0 and 1."""
        if self.form == "numbers" or self.classes == ("0", "1"):
            return []
        remedy = "; give --kind regression if these are numbers to predict" if self.assumed else ""
        absent = [name for name in self.classes if name.casefold() in MISSING]
        doubt = f"; give --missing {' '.join(map(shown, absent))} if this means no label" if absent else ""
        return [f"{self.summary()}{remedy}{doubt}"]


def labels_of(
    source: str,
    name: str,
    column: Sequence[tuple[int, Any]],
    *,
    kind: Kind | None = None,
    missing: Sequence[str] = (),
    rows_per_class: int = 1,
) -> Labels:
    """Return the meaning of a column, derived from its cells.

    Lists are several classes at once. Otherwise, if at least half of the cells are numbers, all must be. 0 and 1, or -1 and 1,
    are two classes, and other whole numbers of few distinct values are classes too. Other cells are names of classes.

    Args:
        source: the file, for errors.
        name: the column.
        column: the place and the cell of each record.
        kind: "classification" or "regression" to decide between classes and numbers.
        missing: cells that stand for no label, beside empty ones.
        rows_per_class: the fewest records for each distinct whole number, by which whole numbers are classes.

    Raises:
        DataError: the cells do not share one meaning; the message names the file, the row, the column and the remedy.
    """
    place = f"column {shown(name)}"
    present = [(row, cell) for row, cell in column if not is_empty(cell, missing)]
    if not present:
        raise _without_label(source, place, column)
    _check_plain(source, place, present)
    if kind != "regression" and any(entries_of(cell) is not None for _, cell in present):
        return _several(source, name, present, missing)
    values = [number_of(cell) for _, cell in present]
    others = [cell for cell, value in zip(present, values, strict=True) if value is None]
    numbers = [value for value in values if value is not None and not math.isnan(value)]
    if not numbers and not others:
        raise _without_label(source, place, column)
    bounds = sum(is_bound(cell) for _, cell in others)
    mostly = len(others) - bounds <= len(numbers) + bounds
    if kind == "regression" or (kind is None and mostly):
        if others:
            raise _not_numbers(source, place, others, kind)
        if kind == "regression" or not are_classes(numbers, rows_per_class):
            return Labels(name, "numbers", missing=tuple(missing))
        if {-1.0, 0.0, 1.0} <= set(numbers):
            row = next(row for row, cell in present if number_of(cell) == -1)
            raise _minus_one(source, place, row, numbers)
    if kind is None:
        _check_dressed(source, place, others, rows_per_class)
    if mostly and not others:
        _check_whole(source, place, present)
        present = [cell for cell, value in zip(present, values, strict=True) if value == value]  # "NA" among numbers
    assumed = kind is None and mostly and not _are_usual(set(numbers))
    _check_case(source, place, present)
    return attrs.evolve(_of_names(name, present, missing), assumed=assumed)


def meanings_of(
    source: str,
    columns: Sequence[tuple[str, Sequence[tuple[int, Any]]]],
    *,
    kind: Kind | None = None,
    missing: Sequence[str] = (),
    rows_per_class: int = 1,
) -> tuple[Labels, ...]:
    """Return the meaning of columns that are predicted together: all are numbers, all two classes, or there is one column.

    Columns of numbers, some of which could be classes alone, are numbers.

    Args:
        source: the file, for errors.
        columns: the name of each column, with the place and the cell of each record.
        kind, missing, rows_per_class: as in `labels_of`.

    Raises:
        DataError: as `labels_of`, or the columns are of different kinds.
    """
    options: dict[str, Any] = {"missing": missing, "rows_per_class": rows_per_class}
    meanings = tuple(labels_of(source, name, column, kind=kind, **options) for name, column in columns)
    if len(meanings) == 1 or all(each.form == "binary" for each in meanings):
        return meanings
    if constant := next((each for each in meanings if len(each.classes) == 1), None):
        raise DataError(
            f"{source}, column {shown(constant.name)}: the only class is {shown(constant.classes[0])}, so nothing can be "
            "learned; name the other columns with --labels"
        )
    numeric = all(
        number_of(cell) is not None for _, column in columns for _, cell in column if not is_empty(cell, missing)
    )
    if kind is None and numeric and any(each.form == "numbers" for each in meanings):
        return tuple(labels_of(source, name, column, kind="regression", **options) for name, column in columns)
    if all(each.form == "numbers" for each in meanings):
        return meanings
    kinds = "; ".join(each.summary() for each in meanings)
    remedy = ", or give --kind regression if they are numbers to predict" if kind is None and numeric else ""
    raise DataError(
        f"{source}: the columns cannot be predicted together ({kinds}); with --labels, name columns of one kind only{remedy}"
    )


def _check_plain(source: str, place: str, present: Sequence[tuple[int, Any]]) -> None:
    """Refuse a cell that holds an object of JSON or Parquet."""
    for row, cell in present:
        if isinstance(cell, dict):
            raise DataError(
                f"{source}, row {row}, {place}: {shown(cell)} is an object with keys; write a number or a class, or name another "
                "column with --labels"
            )


def _check_dressed(source: str, place: str, others: Sequence[tuple[int, Any]], rows_per_class: int) -> None:
    """Refuse numbers with units, percent signs or commas, unless they are few enough to be the names of classes."""
    numbers = [dressed_number(cell) for _, cell in others]
    if others and None not in numbers and not are_classes([x for x in numbers if x is not None], rows_per_class):
        row, cell = others[0]
        raise DataError(
            f"{source}, row {row}, {place}: {shown(cell)} is not a number; write numbers without units or commas, or give "
            "--kind classification if these are classes"
        )


def _check_case(source: str, place: str, present: Sequence[tuple[int, Any]]) -> None:
    """Refuse names of classes that differ only in case."""
    first: dict[str, str] = {}
    for row, cell in present:
        name = name_of(cell)
        if (other := first.setdefault(name.casefold(), name)) != name:
            raise DataError(
                f"{source}, row {row}, {place}: the class {shown(name)} differs from {shown(other)} only in case; write each "
                "class in one way"
            )


def check_varied(source: str, name: str, labels: Iterable[Any]) -> None:
    """Refuse labels that are the same in all rows.

    Args:
        source: the file.
        name: the column.
        labels: the labels, the missing ones apart.

    Raises:
        DataError: the labels are the same.
    """
    distinct = set(labels)
    if len(distinct) == 1:
        raise DataError(
            f"{source}, column {shown(name)}: every label is {distinct.pop()}, so nothing can be learned; name another "
            "column with --labels"
        )


def _minus_one(source: str, place: str, row: int, numbers: Sequence[float]) -> DataError:
    """Return the error of a column of classes in which -1 may mean that there is no label."""
    return DataError(
        f"{source}, {place}: -1 occurs with 0 and 1 ({numbers.count(-1.0)} of {len(numbers)} rows, the first in row {row}); "
        "give --missing -1 if it means that there is no label, or --kind classification if it is a class"
    )


def _check_whole(source: str, place: str, present: Sequence[tuple[int, Any]]) -> None:
    """Refuse a number that is not the name of a class."""
    for row, cell in present:
        value = number_of(cell)
        if value is not None and value % 1 > 0:
            raise DataError(
                f"{source}, row {row}, {place}: {shown(cell)} is a number, not the name of a class; leave out --kind "
                "classification, or name other columns with --labels"
            )


def are_classes(numbers: Sequence[float], rows_per_class: int) -> bool:
    """Return True if numbers are the names of classes."""
    distinct = set(numbers)
    if _are_usual(distinct):
        return True
    few = 2 <= len(distinct) <= len(numbers) / rows_per_class
    few &= len(distinct) <= max(_FEW_CLASSES, len(numbers) / _ROWS_OF_MANY)
    return few and all(number.is_integer() for number in distinct)


def _are_usual(distinct: set[float]) -> bool:
    """Return True if distinct numbers are the usual ones of two classes."""
    return bool(distinct) and (distinct <= {0.0, 1.0} or distinct == {-1.0, 1.0})


def _of_names(name: str, present: Sequence[tuple[int, Any]], missing: Sequence[str]) -> Labels:
    """Return the labels of cells that are names of classes."""
    names = _sorted({name_of(cell) for _, cell in present})
    if names in (["0"], ["1"]):
        names = ["0", "1"]
    if len(names) == 2 and names[0].casefold() in _POSITIVE and names[1].casefold() not in _POSITIVE:
        names.reverse()
    return Labels(name, "binary" if len(names) == 2 else "classes", tuple(names), tuple(missing))


def _sorted(names: Iterable[str]) -> list[str]:
    """Return names in numerical order if all are whole numbers, else in alphabetical order."""
    return sorted(names, key=int) if _are_whole(names) else sorted(names)


def _are_whole(names: Iterable[str]) -> bool:
    """Return True if names are whole numbers."""
    return all(name.removeprefix("-").isdecimal() for name in names)


def _several(source: str, name: str, present: Sequence[tuple[int, Any]], missing: Sequence[str]) -> Labels:
    """Return the labels of cells that are lists of classes, or of a 0 or 1 for each class."""
    lists = []
    for row, cell in present:
        if (entries := entries_of(cell)) is None:
            raise DataError(
                f"{source}, row {row}, column {shown(name)}: {shown(cell)} is not a list, but others are; write a list of "
                "classes in each row"
            )
        lists.append(entries)
    widths = {len(entries) for entries in lists}
    if len(widths) == 1 and max(widths) > 1 and all(map(is_indicator, lists)):
        classes = _positions(max(widths))
    else:
        classes = tuple(_sorted({name_of(entry) for entries in lists for entry in entries}))
    if len(classes) < 2:
        held = f"only the class {shown(classes[0])}" if classes else "no class"
        raise DataError(f"{source}, column {shown(name)}: the lists hold {held}; give at least two")
    return Labels(name, "several", classes, tuple(missing))


def _without_label(source: str, place: str, column: Sequence[tuple[int, Any]]) -> DataError:
    """Return the error of a column without labels."""
    return DataError(f"{source}, {place}: no row has a label; name another column with --labels, or change --missing")


def _not_numbers(source: str, place: str, others: Sequence[tuple[int, Any]], kind: Kind | None) -> DataError:
    """Return the error of a column of numbers in which some cells are not numbers."""
    row, cell = others[0]
    distinct = list(dict.fromkeys(str(other).strip() for _, other in others))
    option = f"--missing {' '.join(map(shown, distinct[:_NAMED]))}{' ...' if len(distinct) > _NAMED else ''}"
    if all(is_bound(other) for _, other in others):
        fault = f"{shown(cell)} is a bound, not a number (such cells: {len(others)})"
        remedy = f"write a number in each, or read them as missing with {option}"
    else:
        fault = f"{shown(cell)} is not a number"
        remedy = f"correct it, or read it as missing with {option}"
        remedy += "" if kind else ", or name other columns with --labels, or give --kind classification"
    return DataError(f"{source}, row {row}, {place}: {fault}; {remedy}")


def _positions(count: int) -> tuple[str, ...]:
    """Return the names of classes that are known by their place only."""
    return tuple(map(str, range(count)))
