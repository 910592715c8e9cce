"""Files that are replaced whole or not at all, and flushed to the disk."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

__all__ = ["flush", "flush_folder", "named_errors", "replacing", "saving"]


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a path to write to; on exit flush what was written there to the disk and move it to `file`.

    After an error `file` is what it was before.

    Args:
        file: its folder is created if it does not exist.

    Raises:
        OSError: the file cannot be written; the error names it.
    """
    staged = file.with_name(f".{file.name}.new")
    with named_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield staged
            flush(staged)
            os.replace(staged, file)
        finally:
            staged.unlink(missing_ok=True)


@contextlib.contextmanager
def named_errors(file: Path) -> Iterator[None]:
    """Name the file in an OSError that may lack it, such as that of a full disk, which safetensors raises as its own error."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(file)) from error
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(file)) from error


@contextlib.contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Name a folder in the errors of writing tensors to it, and on exit give these files the permissions of new ones.

    safetensors lets only their owner read them.
    """
    with named_errors(folder):
        yield
        new = folder / ".new"
        new.touch()
        try:
            for file in folder.glob("*.safetensors"):
                shutil.copymode(new, file)
        finally:
            new.unlink()


def flush(file: Path) -> None:
    """Flush the content of a closed file to the disk."""
    with open(file, "r+b") as stream:
        os.fsync(stream.fileno())


def flush_folder(folder: Path) -> None:
    """Flush the names of a folder's files to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
