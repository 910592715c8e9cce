"""Examples read from a file or a data set, with the rows that were left out and the reasons."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar, overload

import attrs

from mlopt.errors import ArgumentError

from .files import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Examples", "Skipped", "UnusableError", "check_limit", "gather"]

R = TypeVar("R")
T = TypeVar("T")
_NAMED = 3


class UnusableError(DataError):
    """A row that is not an example.

    Args:
        reason: why the row is not an example.
        subject: the content of the row, for an error if the row is not left out.
    """

    def __init__(self, reason: str, subject: str = "") -> None:
        super().__init__(reason)
        self.reason, self.subject = reason, subject


@attrs.frozen
class Skipped:
    """A row that was left out.

    Args:
        row: 1-based line of the file, a header counted; 0-based in a data set.
        reason: why it is not an example.
    """

    row: int
    reason: str


@attrs.frozen(eq=False, repr=False, kw_only=True)
class Examples(Sequence[T], Generic[T]):
    """The examples of one file or data set, in its order.

    Args:
        examples: the examples.
        rows: the place of each: 1-based line of the file, a header counted; 0-based in a data set.
        records: the 0-based number of each among the records of the whole, those left out counted; `()` for 0, 1, 2, ...
        skipped: the rows left out.
        notes: clauses that a user should read on how the whole was read.
        columns: the columns of the file that hold the contents of an example; `()` if there are none.
        source: the file or the data set.
    """

    examples: tuple[T, ...]
    rows: tuple[int, ...]
    records: tuple[int, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    source: str

    #: A word for the examples.
    noun: ClassVar[str]

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> T | Self:
        return self.subset(range(len(self))[index]) if isinstance(index, slice) else self.examples[index]

    @property
    def name(self) -> str:
        """The file's name, or the data set."""
        return Path(self.source).name

    def subset(self, indices: Iterable[int]) -> Self:
        """Return the examples at the 0-based `indices`, in that order; `skipped` and `notes` stay with the whole."""
        chosen, records = tuple(indices), self.record_numbers()
        return attrs.evolve(
            self,
            examples=tuple(self.examples[i] for i in chosen),
            rows=tuple(self.rows[i] for i in chosen),
            records=tuple(records[i] for i in chosen),
            skipped=(),
            notes=(),
        )

    def contents(self) -> Iterable[str]:
        """Return the contents of the examples, without labels."""
        return map(str, self.examples)

    def checksum(self) -> int:
        """Return a number that differs, but for rare chance, from that of examples with other contents."""
        return zlib.crc32("\0".join(self.contents()).encode())

    def record_numbers(self) -> tuple[int, ...]:
        """Return the 0-based number of each example among the records of the whole, those left out counted."""
        return self.records or tuple(range(len(self)))

    def summary(self) -> str:
        """Return a sentence with the number of examples, the rows left out and the reasons."""
        named = [f"row {skipped.row} ({skipped.reason})" for skipped in self.skipped[:_NAMED]]
        more = f" and {len(self.skipped) - _NAMED} more" if len(self.skipped) > _NAMED else ""
        skipped = f"; {len(self.skipped)} skipped: {', '.join(named)}{more}" if self.skipped else ""
        notes = "".join(f"; {note}" for note in self.notes)
        return f"{len(self)} {self.noun} of {self.name}{skipped}{notes}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.summary()})"


def check_limit(limit: int | None, noun: str) -> None:
    """Refuse a limit under which a corpus is too small to pretrain on."""
    if limit is not None and limit < 2:
        raise ArgumentError(f"limit={limit!r}: a corpus needs at least 2 {noun}; raise the limit or leave it out")


def gather(
    records: Iterable[tuple[int, R]],
    example: Callable[[int, R], T],
    source: str,
    *,
    noun: str,
    strict: bool,
    limit: int | None = None,
    least: int = 1,
) -> dict[str, Any]:
    """Turn records into examples.

    Args:
        records: the contents of each row, with its place.
        example: turns a place and its contents into an example, or raises `UnusableError`.
        source, noun: the file or the data set, and a word for an example.
        strict: refuse a row that is not an example, instead of leaving it out.
        limit, least: the most and the fewest examples.

    Returns:
        The arguments `examples`, `rows`, `records`, `skipped` and `source` of `Examples`.

    Raises:
        DataError: a row that is not an example, or too few examples.
    """
    examples: list[T] = []
    rows: list[int] = []
    numbers: list[int] = []
    skipped: list[Skipped] = []
    first = ""
    for number, (row, record) in enumerate(records):
        try:
            examples.append(example(row, record))
        except UnusableError as fault:
            if strict:
                raise DataError(
                    f"{source}, row {row}: {fault.subject}{fault.reason}; correct it, or leave out --strict"
                ) from None
            first = first or f"; row {row}: {fault.subject}{fault.reason}"
            skipped.append(Skipped(row, fault.reason))
            continue
        rows.append(row)
        numbers.append(number)
        if len(examples) == limit:
            break
    if not examples:
        raise DataError(f"{source}: no row is a {noun}{first}; give at least {least}")
    if len(examples) < least:
        raise DataError(f"{source}: a corpus of one {noun} is too small to pretrain on; give at least {least}")
    return {
        "examples": tuple(examples),
        "rows": tuple(rows),
        "records": tuple(numbers),
        "skipped": tuple(skipped),
        "source": source,
    }
