"""The columns of a table of molecules: the SMILES, and the properties to predict."""

from __future__ import annotations

import re
from datetime import date
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import attrs

from mlopt.validation import shown

from ..cells import is_dressed, is_empty, name_of, number_of
from ..files import DataError
from ..labels import are_classes
from ..splits import is_name_of_split
from ..tables import column_of
from .graphs import import_extra

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..tables import Table

__all__ = ["ROWS_PER_CLASS", "Columns", "columns_of", "smiles_column_of"]

#: The fewest molecules for each distinct whole number, by which whole numbers are classes.
ROWS_PER_CLASS = 5
#: Records by which a column of SMILES is recognised.
_SAMPLE = 20
#: Fewest records by which a column of consecutive numbers is recognised.
_LEAST = 10
_INDEX = re.compile(r"(unnamed(: ?\d+)?|index|idx|row|level_\d+|__index_level_\d+__|#|no\.?|nr\.?)?", re.IGNORECASE)
#: The last word of the name of a column of identifiers.
_IDENTIFIERS = frozenset(("id", "ids", "uid", "uuid", "cid", "sid", "cas", "name", "inchi", "inchikey"))
_WEIGHTS = frozenset(("mw", "molwt", "molweight", "molecularweight", "molarmass", "exactmass", "molwgt", "amw"))
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}(\D|$)")
_WORDS = re.compile(r"[^a-z0-9]+")


@attrs.frozen
class Columns:
    """The columns of a table of molecules.

    Args:
        smiles: the index of the SMILES.
        labels: the indices of the properties to predict.
        notes: clauses that a user should read on the choice.
    """

    smiles: int
    labels: tuple[int, ...]
    notes: tuple[str, ...] = ()


def smiles_column_of(table: Table, name: str | None, option: str = "--smiles-column") -> tuple[int, tuple[str, ...]]:
    """Return the index of the column of SMILES, and clauses on the choice.

    Args:
        table: the table.
        name: the column; "smiles" in any case when None, else the only column of which at least half of the first cells are
            SMILES.
        option: the option that names the column on the command line, for errors.

    Raises:
        DataError: there is no such column, or more than one.
    """
    usual = "smiles" in table.header or sum(column.casefold() == "smiles" for column in table.header) == 1
    sought = name is None and not usual
    likely = [index for index in range(len(table.header)) if sought and _are_smiles(table, index)]
    if not likely:
        column = "smiles" if name is None else name
        return column_of(table.source, table.header, column, f"name the column with {option}"), ()
    names = ", ".join(shown(table.header[index]) for index in likely)
    if len(likely) > 1:
        raise DataError(f"{table.source}: SMILES are in the columns {names}; name one of them with {option}")
    if is_smiles(table.header[likely[0]]):
        raise DataError(
            f"{table.source}, row 1: {names} is a molecule, so the names of the columns are missing; add a first row, such as "
            "'smiles,label'"
        )
    return likely[0], (f"SMILES are read from {names}",)


def columns_of(
    table: Table,
    *,
    smiles_column: str | None,
    labels: Sequence[str] | None,
    ignore: Sequence[str],
) -> Columns:
    """Return the columns of a labelled table.

    Args:
        table: the table.
        smiles_column: as in `smiles_column_of`.
        labels: the properties to predict; by default every column that is not recognised as something else.
        ignore: columns that are not properties to predict.

    Raises:
        DataError: a column does not exist, or none is left.
    """
    header, source = table.header, table.source
    smiles, notes = smiles_column_of(table, smiles_column)
    ignored = {column_of(source, header, name, "name the column with --ignore-columns"): "" for name in ignore}
    if labels is not None:
        if isinstance(labels, str) or not labels:
            raise DataError(
                f"{source}: labels={labels!r} names no label column; available: {', '.join(map(shown, header))}; give --labels"
            )
        columns = tuple(column_of(source, header, label, "name the column with --labels") for label in labels)
        if smiles in columns or len(set(columns)) < len(columns) or set(columns) & set(ignored):
            raise DataError(
                f"{source}: labels={list(labels)!r} must be different columns, not the SMILES column, and not ignored; correct "
                "--labels"
            )
        return Columns(smiles, columns, notes)
    for index in range(len(header)):
        if index != smiles and index not in ignored and (reason := _reason(table, index)):
            ignored[index] = reason
    columns = tuple(index for index in range(len(header)) if index != smiles and index not in ignored)
    if len(header) == 1 and len(header[0].split()) > 1:
        raise DataError(
            f"{source}: the only column is {shown(header[0])}, but a task needs labels; add a column, or separate the cells by "
            "commas, semicolons, tabs or bars"
        )
    reasons = ", ".join(f"{shown(header[k])} ({ignored[k]})" for k in sorted(ignored) if ignored[k])
    if not columns:
        raise DataError(
            f"{source}: no column other than {shown(header[smiles])} has labels{f'; ignored: {reasons}' if reasons else ''}; "
            "name the columns to predict with --labels"
        )
    if reasons:
        notes = (*notes, f"not predicted: {reasons}; name a column with --labels to predict it")
    return Columns(smiles, columns, notes)


def _reason(table: Table, index: int) -> str:
    """Return the reason why a column is not a property to predict, empty if it may be one."""
    name = table.header[index]
    words = [word for word in _WORDS.split(re.sub(r"([a-z])([A-Z])", r"\1 \2", name).casefold()) if word]
    if _INDEX.fullmatch(name):
        return "an index" if name else "without a name"
    if words and (words[-1] in _IDENTIFIERS or words[-1].endswith("smiles")):
        return "an identifier"
    if "".join(words) in _WEIGHTS:
        return "the molecular weight"
    cells = [cell for _, cell in table.column(index) if not is_empty(cell)]
    if not cells:
        return "empty"
    numbers = [number_of(cell) for cell in cells]
    if all(number is not None for number in numbers):
        whole = [number for number in numbers if number is not None and number == number]
        if not table.named and whole and all(map(float.is_integer, whole)) and not are_classes(whole, ROWS_PER_CLASS):
            return "whole numbers, which may be catalogue numbers"
        steps = {float(b) - float(a) for a, b in pairwise(numbers) if a is not None and b is not None}
        return "consecutive numbers" if len(cells) >= _LEAST and steps == {1.0} else ""
    if all(map(_is_date, cells)):
        return "dates"
    names = {name_of(cell) for cell in cells}
    if len(names) == 1 and len(cells) > 1:
        return f"{shown(names.pop())} in all rows"
    if all(is_name_of_split(each) for each in names):
        return "the names of splits, see --split-column"
    text = 2 * sum(number is None for number in numbers) > len(cells) and len(names) > max(2, len(cells) / 2)
    # A number that is written in another way gets an error of its own.
    meant = any(str(cell).strip()[:1] in "<>" for cell in cells) or all(map(is_dressed, cells))
    return f"{len(names)} different texts" if text and not meant else ""


def _is_date(cell: Any) -> bool:
    """Return True for a date, also one that is written as in 2020-01-31."""
    return isinstance(cell, date) or (isinstance(cell, str) and _DATE.match(cell.strip()) is not None)


def _are_smiles(table: Table, index: int) -> bool:
    cells = [cell for _, cell in table.column(index) if isinstance(cell, str) and cell.strip()][:_SAMPLE]
    return bool(cells) and 2 * sum(map(is_smiles, cells)) >= len(cells)


def is_smiles(cell: Any) -> bool:
    """Return True if a cell is a molecule, and not a number."""
    if number_of(cell) is not None or not cell.strip():
        return False
    with import_extra("rdkit.rdBase").BlockLogs():
        return import_extra("rdkit.Chem").MolFromSmiles(cell.strip()) is not None
