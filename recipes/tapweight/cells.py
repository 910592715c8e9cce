"""Single cells of tables: missing ones, numbers and their look-alikes, names of classes, and lists."""

from __future__ import annotations

import ast
import json
import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "MISSING",
    "dressed_number",
    "entries_of",
    "is_bound",
    "is_dressed",
    "is_empty",
    "is_indicator",
    "label_text",
    "name_of",
    "number_of",
]

#: Spellings of a missing number, in any case. Among the names of classes they are names.
MISSING = ("na", "n/a", "nan", "-nan", "null", "none", "#n/a", "#na", "<na>")
#: A number with something that keeps it from being one: a unit, a percent sign, commas.
_DRESSED = re.compile(r"[+-]?(\d[\d.,]*)\s*(%|[^\W\d]{1,3}|)", re.UNICODE)
#: A whole number, as spreadsheets and other programs write it.
_WHOLE = re.compile(r"[+-]?(\d+)(\.0*)?")
_BOUND = re.compile(r"\s*[<>\u2264\u2265~]=?\s*[+-]?[\d.,]+(e[+-]?\d+)?\s*", re.IGNORECASE)


def is_empty(cell: Any, missing: Sequence[str] = ()) -> bool:
    """Return True if a cell is empty, NaN, or one of the spellings of a missing label."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return True
    if isinstance(cell, str) and not cell.strip():
        return True
    return (
        bool(missing) and not isinstance(cell, (list, tuple)) and name_of(cell) in {name_of(each) for each in missing}
    )


def name_of(cell: Any) -> str:
    """Return the name of a class; 1, 1.0, "1", "1.00" and "+1" have the same name."""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    text = str(cell).strip()
    if (whole := _WHOLE.fullmatch(text)) is None:
        return text
    digits = whole[1]
    return f"-{digits}" if text.startswith("-") and digits.strip("0") else digits


def label_text(value: float) -> str:
    """Return a label in as few digits as single precision needs, without an exponent; empty if it is missing."""
    return "" if math.isnan(value) else np.format_float_positional(np.float32(value), trim="-")


def number_of(cell: Any) -> float | None:
    """Return the number that a cell stands for: NaN if it is missing, None if it is not a number."""
    if isinstance(cell, str) and cell.strip().casefold() in MISSING:
        return math.nan
    # float() accepts digits grouped by underscores.
    if isinstance(cell, bool) or (isinstance(cell, str) and "_" in cell):
        return None
    try:
        return float(cell)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        return None


def is_dressed(cell: Any) -> bool:
    """Return True for a number with a unit, a percent sign or commas, such as "1,000" or "3 uM"."""
    return number_of(cell) is None and _DRESSED.fullmatch(str(cell).strip()) is not None


def dressed_number(cell: Any) -> float | None:
    """Return the number of a cell without its unit and its commas: NaN if that is not a number, None for another cell."""
    match = _DRESSED.fullmatch(str(cell).strip())
    if match is None:
        return None
    number = number_of(match[1].replace(",", ""))
    return math.nan if number is None else number


def is_bound(cell: Any) -> bool:
    """Return True for a censored number, such as ">10000"."""
    return isinstance(cell, str) and _BOUND.fullmatch(cell) is not None


def entries_of(cell: Any) -> list[Any] | None:
    """Return the entries of a list, also of one that is written as text; None for anything else."""
    if isinstance(cell, str) and cell.strip().startswith("[") and cell.strip().endswith("]"):
        for read in (json.loads, ast.literal_eval):
            try:
                cell = read(cell.strip())
                break
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    return list(cell) if isinstance(cell, (list, tuple)) else None


def is_indicator(entries: Sequence[Any]) -> bool:
    """Return True if a list holds nothing but 0 and 1."""
    return all(number_of(entry) in (0.0, 1.0) or isinstance(entry, bool) for entry in entries)
