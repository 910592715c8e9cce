"""Read text files and tables, gzipped or not; errors name the file, the row and the remedy."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from mlopt.errors import MloptError
from mlopt.validation import shown

from .names import suggestion

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["DataError", "column_of", "lines_of", "suffix_of", "table_of", "text_of"]


class DataError(MloptError, ValueError):
    """A file or a data set that cannot be used; the message names the place, the content and the remedy."""


def suffix_of(path: Path, known: Sequence[str]) -> str:
    """Return the suffix of a file, `.gz` apart, after checking that it is a known one."""
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix not in known:
        names = ", ".join(f"{name}, {name}.gz" for name in known)
        raise DataError(f"{path}: the suffix {suffix!r} is not one of {names}; rename or convert the file")
    return suffix


def text_of(path: Path) -> str:
    """Return the text of a file that may be gzipped; an error names the line that is not text."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, ValueError):  # ValueError: a NUL in the path
        raise FileNotFoundError(f"{path}: no such file; give the path of a data file") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; give the path of a data file") from error
    if path.name.lower().endswith(".gz"):
        try:
            content = gzip.decompress(content)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path}: not a whole gzip file ({error}); compress it again or drop .gz") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row, byte = _row(error.object[: error.start]), error.object[error.start]
        raise DataError(f"{path}, row {row}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8 text") from error
    if "\0" in text:
        row = _row(content[: content.index(b"\0")])
        raise DataError(f"{path}, row {row}: a NUL byte, so this is not a text file; save the file as UTF-8 text")
    if not text.strip():
        raise DataError(f"{path}: the file is empty; give a file with at least one example")
    return text


def _row(before: bytes) -> int:
    """Return the 1-based line that follows some bytes of a file, for any convention of line ends."""
    return len((before + b".").splitlines())


def lines_of(path: Path) -> Iterator[str]:
    """Return the lines of a file, for any convention of line ends."""
    return io.StringIO(text_of(path), newline=None)


def table_of(path: Path, longest: int = 2**17) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """Return the header of a CSV file, and its further records, each with its first line.

    Args:
        path: the file.
        longest: the most characters of a cell; a longer one has an open quote.
    """
    records = _records(path, longest)
    _, header = next(records)
    header = [name.strip() for name in header]
    if duplicates := sorted({name for name in header if header.count(name) > 1}):
        raise DataError(f"{path}: the header names {shown(duplicates[0])} more than once; rename the columns")
    return header, records


def _records(path: Path, longest: int) -> Iterator[tuple[int, list[str]]]:
    """Yield the records of a CSV file, all of one length, each with its first line; skip blank lines."""
    reader = csv.reader(io.StringIO(text_of(path), newline=""), strict=True)
    width = None
    while True:
        row = reader.line_num + 1
        # The limit is global to the process.
        limit = csv.field_size_limit(longest)
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}, row {row}: not valid CSV ({error}); check the quotes from there on") from error
        finally:
            csv.field_size_limit(limit)
        if not cells:
            continue
        width = width or len(cells)
        if len(cells) != width:
            raise DataError(f"{path}, row {row}: {len(cells)} cells, but the header has {width}; quote or add commas")
        yield row, cells


def column_of(source: Path | str, header: Sequence[str], name: str) -> int:
    """Return the index of a column, found by its exact name, else by its name in any case."""
    if name in header:
        return header.index(name)
    alike = [index for index, other in enumerate(header) if other.casefold() == name.casefold()]
    if len(alike) != 1:
        raise DataError(f"{source}: no column {name!r}{suggestion(name, header)}")
    return alike[0]
