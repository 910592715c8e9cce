"""Read text from files, compressed or not, in any usual encoding; errors name the file, the row and the remedy."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from mlopt.errors import MloptError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Content", "DataError", "File", "suffix_of", "text_of", "unpacked"]

_UNPACKED: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    ".gz": ("gzip", gzip.decompress),
    ".xz": ("xz", lzma.decompress),
    ".bz2": ("bzip2", bz2.decompress),
}
_PACKED = (*_UNPACKED, ".zip")
#: The marks at the start of a file that state its encoding; of two that start alike, the longer one first.
_MARKS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
_NAMES = {
    "utf-16": "UTF-16",
    "utf-32": "UTF-32",
    "utf-16-le": "UTF-16",
    "utf-16-be": "UTF-16",
    "cp1252": "Windows-1252",
}
_SPREADSHEETS = (".xlsx", ".xls", ".ods")


class DataError(MloptError, ValueError):
    """A file or a data set that cannot be used; the message names the place, the content and the remedy."""


@attrs.frozen
class File:
    """The bytes of a file, unpacked.

    Args:
        path: the file.
        name: its name without the suffix of a compression; in an archive, the name of the file inside.
        content: the bytes.
    """

    path: Path
    name: str
    content: bytes


@attrs.frozen
class Content:
    """The text of a file.

    Args:
        text: the text.
        notes: clauses that a user should read on how it was decoded.
    """

    text: str
    notes: tuple[str, ...] = ()

    def lines(self) -> io.StringIO:
        """Return the lines, for any convention of line ends."""
        return io.StringIO(self.text, newline=None)


def suffix_of(path: Path, known: Sequence[str]) -> str:
    """Return the suffix of a file, a compression's apart, after checking that it is a known one."""
    name = path.name.lower()
    packed = next((suffix for suffix in _PACKED if name.endswith(suffix)), "")
    suffix = Path(name.removesuffix(packed)).suffix
    if suffix in _SPREADSHEETS:
        raise DataError(
            f"{path} is a spreadsheet; save its sheet as CSV in the spreadsheet program, and give that file"
        )
    if packed == ".zip" and not suffix and path.is_file():
        return suffix_of(Path(unpacked(path).name), known)
    if suffix not in known:
        raise DataError(
            f"{path}: the suffix {suffix!r} is not one of {', '.join(known)}, also with {', '.join(_PACKED)}; rename or "
            "convert the file"
        )
    return suffix


def unpacked(path: Path) -> File:
    """Return the bytes of a file that may be compressed."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, ValueError):  # ValueError: a NUL in the path
        raise FileNotFoundError(f"{path}: no such file; give the path of a data file") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; give the path of a data file") from error
    packed = path.suffix.lower()
    if packed == ".zip":
        return _member(path, content)
    if packed not in _UNPACKED:
        return File(path, path.name, content)
    name, unpack = _UNPACKED[packed]
    try:
        return File(path, path.stem, unpack(content))
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        raise DataError(
            f"{path} is not a complete {name} file ({error}); compress it again, or drop the suffix {packed}"
        ) from error


def _member(path: Path, content: bytes) -> File:
    """Return the one file of an archive."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = [n for n in archive.namelist() if not n.endswith("/") and not n.startswith("__MACOSX/")]
            if len(names) != 1:
                raise DataError(f"{path}: the archive holds {len(names)} files; unpack it, and give one of them")
            return File(path, names[0], archive.read(names[0]))
    except (zipfile.BadZipFile, OSError, EOFError, zlib.error, RuntimeError, NotImplementedError) as error:
        raise DataError(f"{path} is not a complete zip file ({error}); unpack it, and give the file inside") from error


def text_of(path: Path) -> Content:
    """Return the text of a file; an error names the line that is not text.

    A mark at the start states UTF-8, UTF-16 or UTF-32. Without one, text is UTF-8; UTF-16 if every second byte is 0; otherwise
    Windows-1252, which covers Latin-1.
    """
    content = unpacked(path).content
    encoding = _encoding(content)
    notes = () if encoding.startswith("utf-8") else (f"read as {_NAMES[encoding]}",)
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        row, byte = _row(content[: error.start]), content[error.start]
        raise DataError(
            f"{path}, row {row}: byte 0x{byte:02x} is not {_NAMES.get(encoding, 'UTF-8')} text; save the file as UTF-8 text"
        ) from error
    if "\0" in text:
        row = _row(text[: text.index("\0")].encode())
        raise DataError(
            f"{path}, row {row}: the row holds a NUL byte, so this is not a text file; save the file as UTF-8 text"
        )
    if not text.strip():
        raise DataError(f"{path}: the file is empty; give a file with at least one example")
    return Content(text, notes)


def _encoding(content: bytes) -> str:
    """Return the encoding of a file, by the mark at its start, else by its bytes."""
    for mark, name in _MARKS.items():
        if content.startswith(mark):
            return name
    # Of Latin text in UTF-16, one byte of each pair is 0, and no other.
    for name, zeros in (("utf-16-le", content[1::2]), ("utf-16-be", content[::2])):
        if len(content) % 2 == 0 and len(content) >= 4 and zeros.count(0) == len(zeros) == content.count(0):
            return name
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        # A file with a NUL is not text; one with characters of several bytes is UTF-8 that is damaged.
        damaged = b"\0" in content or not content.decode("utf-8", errors="ignore").isascii()
        return "utf-8" if damaged else "cp1252"
    return "utf-8"


def _row(before: bytes) -> int:
    """Return the 1-based line that follows some bytes of a file, for any convention of line ends."""
    return len((before + b".").splitlines())
