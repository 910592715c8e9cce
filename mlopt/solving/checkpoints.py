"""Checkpoints of a run: a folder that holds the newest ones, each whole or not there."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from ..errors import CheckpointError, CheckpointWarning
from ..files import flush_folder
from ..validation import at_least, must_be
from . import archive

__all__ = ["Checkpoints"]

_FORMAT = 1
_MANIFEST = "manifest.json"
#: What is not finished, or is about to be removed; and what stood where another one of the same step goes.
_PARTIAL, _REPLACED = "partial-", "replaced-"

_REMEDIES = {
    errno.ENOSPC: "free some space, or keep fewer checkpoints",
    errno.EDQUOT: "free some of your quota, or keep fewer checkpoints",
    errno.EFBIG: "raise the limit on the size of a file (`ulimit -f`)",
    errno.EROFS: "give a folder on a file system that can be written",
    errno.EACCES: "give yourself the permission to write there, or give another folder",
    errno.EPERM: "give yourself the permission to write there, or give another folder",
    errno.EEXIST: "a file has that name: give another folder",
    errno.ENOTDIR: "a file is where a folder should be: give another folder",
    errno.EIO: "the device does not work: give a folder on another one",
}


@attrs.frozen
class Checkpoints:
    """Where, and how often, the state of a run is saved, so that a run that was cut off goes on as if it had not been.

    A folder holds, for the checkpoint of outer step 42,

        step-00000042/tensors.safetensors    every tensor of the state
                      state.json             everything else
                      manifest.json          format, version of mlopt, step, score; size and SHA-256 of the other files

    No pickle: reading runs no code. A checkpoint is written under another name, each file flushed to the disk, the manifest last;
    then the folder gets its name in one atomic operation, and only then older ones are removed. So at every moment, whatever
    cuts the run off, the last checkpoint that was saved is there and whole, also while one of the same step is replaced. What
    else lies in the folder is left alone. `fault-00000042` is what a run that failed left for inspection: never resumed from,
    never removed.

    On reading, the manifest must be there and undamaged, of a format that this version knows and of the folder's step, and the
    files of the sizes and hashes that it lists. A checkpoint of which this does not hold is passed over for the one before.

    One run writes into a folder at a time.

    Args:
        folder: where; made if missing, its parents too.
        every: outer steps from one checkpoint to the next.
        keep: how many of the newest to keep.
        best: a column of the log, such as "evaluation/accuracy"; the best checkpoint by it is kept too, the earliest of equal
            ones. Scores that are not finite are never best.
        greater_is_better: whether a greater value in that column is a better one.

    Raises:
        ValueError: an argument is none of these.

    Example:
        >>> checkpoints = mlopt.Checkpoints("runs/first", every=100, best="weights/loss")
    """

    folder: Path = attrs.field(converter=Path)
    every: int = attrs.field(default=100, validator=at_least(1))
    keep: int = attrs.field(default=2, validator=at_least(1))
    best: str | None = attrs.field(
        default=None,
        validator=must_be(
            lambda value: value is None or isinstance(value, str), "the name of a column of the log, or None"
        ),
    )
    greater_is_better: bool = False

    def due(self, step: int) -> bool:
        """Return whether the run saves after this outer step."""
        return step % self.every == 0

    def claim(self, resume: bool) -> None:
        """Make the folder, clear away what interrupted saves left, and find out whether it can be written.

        Raises:
            CheckpointError: it holds checkpoints and `resume` is False, or it cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            found = self._found()
            if found and not resume:
                raise CheckpointError(
                    f"{self.folder} holds checkpoints already, the newest {found[-1][1].name}: go on from it with resume=True, "
                    "or give another folder"
                )
            for entry in sorted(self.folder.iterdir()):
                if re.fullmatch(rf"{_PARTIAL}((step|fault)-[0-9]+|trial)", entry.name):
                    _remove(entry)
                elif re.fullmatch(rf"{_REPLACED}(step|fault)-[0-9]+", entry.name):
                    _settle(entry.with_name(entry.name.removeprefix(_REPLACED)))
            trial = self.folder / f"{_PARTIAL}trial"
            archive.write_file(trial, b"can this be written?")
            trial.unlink()
            flush_folder(self.folder)
        except OSError as error:
            raise CheckpointError(f"checkpoints cannot be written to {self.folder}: {_told(error)}") from error

    def save(self, step: int, state: Mapping[str, Any], score: float | None = None) -> Path:
        """Write the checkpoint of a step, then remove those that are no longer to be kept.

        Only whole checkpoints of earlier steps are removed; one of the same step is replaced.

        Args:
            step: outer steps taken.
            state: what `archive.write` takes.
            score: the value of the column `best` at this step.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: the state holds something that cannot be saved, or it cannot be written; what was there before
                still is.

        Warns:
            CheckpointWarning: an old checkpoint could not be removed.
        """
        saved = self._write("step", step, state, score)
        self._rotate(step)
        return saved

    def save_fault(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write the state of a run that fails, for inspection; nothing is removed but an earlier one of the same step.

        Raises:
            CheckpointError: as `save`.
        """
        return self._write("fault", step, state, None)

    def newest(self) -> tuple[int, Path, dict[str, Any]] | None:
        """Read the newest whole checkpoint.

        Returns:
            Its step, its folder and its state; None where there is no checkpoint.

        Raises:
            CheckpointError: there are checkpoints, and none of them is whole.

        Warns:
            CheckpointWarning: a newer one was passed over, and why.
        """
        broken: list[str] = []
        for step, folder in reversed(self._found()):
            try:
                _check(folder, step)
                state = archive.read(folder)
            except (CheckpointError, OSError) as error:
                broken.append(f"{folder}: {_told(error)}")
                continue
            for reason in broken:
                warnings.warn(f"passed over a checkpoint that is not whole, {reason}", CheckpointWarning, stacklevel=2)
            return step, folder, state
        if broken:
            raise CheckpointError(
                "none of the checkpoints is whole; put a copy in place, or begin again in another folder:\n"
                + "\n".join(broken)
            )
        return None

    def _found(self) -> list[tuple[int, Path]]:
        """Return what claims to be a checkpoint, oldest first; one that was being replaced before what replaces it."""
        try:
            entries = [entry for entry in self.folder.iterdir() if entry.is_dir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"checkpoints cannot be read from {self.folder}: {_told(error)}") from error
        matches = [(re.fullmatch(rf"({_REPLACED})?step-([0-9]+)", entry.name), entry) for entry in entries]
        steps = [(int(match[2]), not match[1], entry) for match, entry in matches if match]
        return [(step, entry) for step, _, entry in sorted(steps)]

    def _write(self, kind: str, step: int, state: Mapping[str, Any], score: float | None) -> Path:
        assert step >= 0
        target = self.folder / f"{kind}-{step:08d}"
        staging = target.with_name(_PARTIAL + target.name)
        try:
            _settle(target)
            _remove(staging)
            staging.mkdir(parents=True)
            archive.write(staging, state)
            archive.write_file(staging / _MANIFEST, self._manifest(staging, step, score))
            flush_folder(staging)
            _move(staging, target)
            flush_folder(self.folder)
        except OSError as error:
            raise CheckpointError(f"{target} cannot be saved: {_told(error)}; {self._what_is_whole()}") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        _discard(target.with_name(_REPLACED + target.name))
        return target

    def _manifest(self, staging: Path, step: int, score: float | None) -> bytes:
        manifest = {
            "format": _FORMAT,
            "mlopt": _version(),
            "step": step,
            "best": self.best,
            "score": float(score) if score is not None and math.isfinite(score) else None,
            "files": {
                name: {"bytes": (staging / name).stat().st_size, "sha256": _hash(staging / name)}
                for name in (archive.TENSORS, archive.STATE)
            },
        }
        return json.dumps({**manifest, "sha256": _digest(manifest)}, indent=2).encode()

    def _rotate(self, step: int) -> None:
        """Remove the whole checkpoints before this step that are neither among the newest nor best.

        Later ones are not of this line of steps: those that a resumed run passed over, and will replace.
        """
        whole: dict[int, tuple[Path, dict[str, Any]]] = {}
        for number, folder in self._found():
            try:
                if number <= step:
                    whole[number] = folder, _read_manifest(folder, number)
            except (CheckpointError, OSError):
                # Not to be counted as kept, and not certain to be ours to remove; who reads it is told what it lacks.
                continue
        keep = set(list(whole)[-self.keep :])
        # What another column said says nothing about this one.
        scores = {k: m["score"] for k, (_, m) in whole.items() if m["best"] == self.best and m["score"] is not None}
        if self.best is not None and scores:
            keep.add((max if self.greater_is_better else min)(scores, key=scores.__getitem__))
        for number, (folder, _) in whole.items():
            if number not in keep:
                _discard(folder)

    def _what_is_whole(self) -> str:
        for step, folder in reversed(self._found()):
            if _is_whole(folder, step):
                return f"the newest whole checkpoint is {folder.name}"
        return "there is no whole checkpoint"


def _version() -> str:
    try:
        return importlib.metadata.version("mlopt-torch")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _read_manifest(folder: Path, step: int) -> dict[str, Any]:
    """Return the manifest of a checkpoint whose files are there and of their sizes; their content is not looked at."""
    try:
        with open(folder / _MANIFEST, "rb") as file:
            manifest = json.loads(file.read())
    except FileNotFoundError:
        raise CheckpointError(f"it has no {_MANIFEST}: the save was cut off, or part of it was removed") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its {_MANIFEST} is damaged: {error}") from error
    if not isinstance(manifest, dict) or type(manifest.get("format")) is not int:
        raise CheckpointError(f"its {_MANIFEST} is damaged: it is no manifest")
    if manifest["format"] > _FORMAT:
        raise CheckpointError(
            f"it is of format {manifest['format']}, and this mlopt reads formats up to {_FORMAT}: update it"
        )
    if manifest.pop("sha256", None) != _digest(manifest):
        raise CheckpointError(f"its {_MANIFEST} is damaged: it does not have its SHA-256")
    if manifest["step"] != step:
        raise CheckpointError(f"its {_MANIFEST} is of step {manifest['step']}: it was renamed")
    for name, expected in manifest["files"].items():
        try:
            size = (folder / name).stat().st_size
        except FileNotFoundError:
            raise CheckpointError(f"its {name} is missing") from None
        if size != expected["bytes"]:
            raise CheckpointError(f"its {name} has {size} bytes of {expected['bytes']}")
    return manifest


def _check(folder: Path, step: int) -> None:
    for name, expected in _read_manifest(folder, step)["files"].items():
        if _hash(folder / name) != expected["sha256"]:
            raise CheckpointError(f"its {name} is damaged: it does not have its SHA-256")


def _is_whole(folder: Path, step: int) -> bool:
    try:
        _check(folder, step)
    except (CheckpointError, OSError):
        return False
    return True


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _move(staging: Path, target: Path) -> None:
    """Give what is staged its name; what has that name takes another one, by which it is still found."""
    replaced = target.with_name(_REPLACED + target.name)
    if target.is_dir():
        os.rename(target, replaced)
    try:
        os.rename(staging, target)
    except OSError:
        if replaced.is_dir():
            os.rename(replaced, target)
        raise


def _settle(target: Path) -> None:
    """Finish a replacement that was cut off: what was replaced goes back where nothing whole has replaced it."""
    replaced, step = target.with_name(_REPLACED + target.name), int(target.name.partition("-")[2])
    if not replaced.is_dir():
        return
    if not target.is_dir():
        os.rename(replaced, target)
    elif _is_whole(replaced, step) and not _is_whole(target, step):
        _remove(target)
        os.rename(replaced, target)
    else:
        _remove(replaced)


def _discard(folder: Path) -> None:
    """Remove a folder, its name first; the run goes on where this fails."""
    try:
        if folder.is_dir():
            doomed = folder.with_name(_PARTIAL + folder.name.removeprefix(_REPLACED))
            _remove(doomed)
            os.rename(folder, doomed)
            _remove(doomed)
    except OSError as error:
        warnings.warn(
            f"{folder} is no longer needed and cannot be removed: {_told(error)}", CheckpointWarning, stacklevel=3
        )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _told(error: Exception) -> str:
    """Return what an error says, and for one of the system where and how to mend it."""
    if not isinstance(error, OSError):
        return str(error)
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}; {_REMEDIES.get(error.errno or 0, 'give another folder')}"
