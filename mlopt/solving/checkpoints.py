"""Checkpoints of a run: a folder that holds the newest ones, each complete."""

from __future__ import annotations

import errno
import hashlib
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
from ..imports import installed_version
from ..validation import at_least, boolean, must_be
from . import serialization

__all__ = ["Checkpoints"]

_FORMAT = 1
_MANIFEST = "manifest.json"
#: Prefixes of folders: unfinished or about to be removed; and replaced by a new checkpoint of the same step.
_PARTIAL, _REPLACED = "partial-", "replaced-"

_REMEDIES = {
    errno.ENOSPC: "free some space, or keep fewer checkpoints",
    errno.EDQUOT: "free some of your quota, or keep fewer checkpoints",
    errno.EFBIG: "raise the limit on the size of a file (`ulimit -f`)",
    errno.EROFS: "give a folder on a writable file system",
    errno.EACCES: "change the permissions, or give another folder",
    errno.EPERM: "change the permissions, or give another folder",
    errno.EEXIST: "a file has that name: give another folder",
    errno.ENOTDIR: "a file is where a folder should be: give another folder",
    errno.EIO: "the device failed: give a folder on another one",
}


@attrs.frozen
class Checkpoints:
    """A folder of checkpoints, from which an interrupted run resumes as if it had not been interrupted.

    The checkpoint of outer step 42 consists of

        step-00000042/tensors.safetensors    every tensor of the state
                      state.json             everything else
                      manifest.json          format, version of mlopt, step, score; size and SHA-256 of the other files

    There is no pickle, so reading runs no code. A checkpoint is written under another name, and each file is flushed to the
    disk, the manifest last. Then the folder is renamed in one atomic operation, and only then are older checkpoints removed.
    Therefore the last saved checkpoint is complete at every moment, also while one of the same step is replaced. Other files in
    the folder are not touched. `fault-00000042` is the state of a failed run, for inspection; it is never loaded or removed.

    Before a checkpoint is loaded, its manifest, sizes and hashes are verified. An incomplete checkpoint is skipped, and the one
    before it is loaded.

    Only one run at a time may write to a folder.

    Args:
        folder: created if it does not exist, with its parents.
        every: outer steps between checkpoints.
        keep: number of newest checkpoints to keep.
        best: a column of the history, such as "evaluation/accuracy"; the checkpoint with the best value is kept as well, the
            earliest of equal ones. Values that are not finite are never best.
        greater_is_better: whether a greater value is better.

    Raises:
        ArgumentError: an argument is out of range.

    Example:
        >>> from mlopt.testing import quadratic
        >>> checkpoints = mlopt.Checkpoints("runs/first", every=5, keep=1, best="x/loss")
        >>> solution = mlopt.solve(quadratic("two", mlopt.Identity()).problem, steps=10, checkpoint=checkpoints)
        >>> sorted(folder.name for folder in checkpoints.folder.iterdir())
        ['step-00000010']
    """

    folder: Path = attrs.field(converter=Path)
    every: int = attrs.field(default=100, validator=at_least(1))
    keep: int = attrs.field(default=2, validator=at_least(1))
    best: str | None = attrs.field(
        default=None,
        validator=must_be(
            lambda value: value is None or isinstance(value, str), "the name of a column of the history, or None"
        ),
    )
    greater_is_better: bool = attrs.field(default=False, validator=boolean)

    def due(self, step: int) -> bool:
        """Return whether the run is saved after this outer step."""
        return step % self.every == 0

    def prepare(self, resume: bool) -> None:
        """Create the folder, remove the remains of interrupted saves, and test that the folder can be written.

        Raises:
            CheckpointError: the folder holds checkpoints and `resume` is False, or it cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            existing = self._candidates()
            if existing and not resume:
                raise CheckpointError(
                    f"{self.folder} already holds checkpoints, the newest {existing[-1][1].name}: resume from it with "
                    "resume=True, or give another folder"
                )
            for entry in sorted(self.folder.iterdir()):
                if re.fullmatch(rf"{_PARTIAL}((step|fault)-[0-9]+|trial)", entry.name):
                    _remove(entry)
                elif re.fullmatch(rf"{_REPLACED}(step|fault)-[0-9]+", entry.name):
                    _finish_replacement(entry.with_name(entry.name.removeprefix(_REPLACED)))
            trial = self.folder / f"{_PARTIAL}trial"
            serialization.write_file(trial, b"can this folder be written?")
            trial.unlink()
            flush_folder(self.folder)
        except OSError as error:
            raise CheckpointError(f"checkpoints cannot be written to {self.folder}: {_explain(error)}") from error

    def save(self, step: int, state: Mapping[str, Any], score: float | None = None) -> Path:
        """Write the checkpoint of a step, then remove those that need not be kept.

        Only complete checkpoints of earlier steps are removed. A checkpoint of the same step is replaced.

        Args:
            step: outer steps taken.
            state: a state for `serialization.write`.
            score: the value of the column `best` at this step.

        Returns:
            The folder of the checkpoint.

        Raises:
            CheckpointError: the checkpoint cannot be written, or the state contains a value that no checkpoint can hold. The
                previous checkpoints are unchanged.

        Warns:
            CheckpointWarning: an old checkpoint could not be removed.
        """
        saved = self._write("step", step, state, score)
        self._rotate(step)
        return saved

    def save_fault(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write the state of a failed run, for inspection; replace an earlier one of the same step.

        Raises:
            CheckpointError: as `save`.
        """
        return self._write("fault", step, state, None)

    def newest(self) -> tuple[int, Path, dict[str, Any]] | None:
        """Read the newest complete checkpoint.

        Returns:
            Its step, its folder and its state; None if there is no checkpoint.

        Raises:
            CheckpointError: there are checkpoints, but none is complete.

        Warns:
            CheckpointWarning: a newer checkpoint was skipped; the message gives the reason.
        """
        incomplete: list[str] = []
        for step, folder in reversed(self._candidates()):
            try:
                _check(folder, step)
                state = serialization.read(folder)
            except (CheckpointError, OSError) as error:
                incomplete.append(f"{folder}: {_explain(error)}")
                continue
            for reason in incomplete:
                warnings.warn(f"skipped an incomplete checkpoint, {reason}", CheckpointWarning, stacklevel=2)
            return step, folder, state
        if incomplete:
            raise CheckpointError(
                "none of the checkpoints is complete; restore one from a copy, or start again in another folder:\n"
                + "\n".join(incomplete)
            )
        return None

    def _candidates(self) -> list[tuple[int, Path]]:
        """Return folders named like checkpoints, oldest first; a replaced one before its replacement."""
        try:
            entries = [entry for entry in self.folder.iterdir() if entry.is_dir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"checkpoints cannot be read from {self.folder}: {_explain(error)}") from error
        matches = [(re.fullmatch(rf"({_REPLACED})?step-([0-9]+)", entry.name), entry) for entry in entries]
        steps = [(int(match[2]), not match[1], entry) for match, entry in matches if match]
        return [(step, entry) for step, _, entry in sorted(steps)]

    def _write(self, kind: str, step: int, state: Mapping[str, Any], score: float | None) -> Path:
        assert step >= 0
        target = self.folder / f"{kind}-{step:08d}"
        staging = target.with_name(_PARTIAL + target.name)
        try:
            _finish_replacement(target)
            _remove(staging)
            staging.mkdir(parents=True)
            serialization.write(staging, state)
            serialization.write_file(staging / _MANIFEST, self._manifest(staging, step, score))
            flush_folder(staging)
            _move(staging, target)
            flush_folder(self.folder)
        except OSError as error:
            raise CheckpointError(f"{target} cannot be saved: {_explain(error)}; {self._newest_complete()}") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        _discard(target.with_name(_REPLACED + target.name))
        return target

    def _manifest(self, staging: Path, step: int, score: float | None) -> bytes:
        manifest = {
            "format": _FORMAT,
            "mlopt": installed_version(),
            "step": step,
            "best": self.best,
            "score": float(score) if score is not None and math.isfinite(score) else None,
            "files": {
                name: {"bytes": (staging / name).stat().st_size, "sha256": _hash(staging / name)}
                for name in (serialization.TENSORS, serialization.STATE)
            },
        }
        return json.dumps({**manifest, "sha256": _digest(manifest)}, indent=2).encode()

    def _rotate(self, step: int) -> None:
        """Remove complete checkpoints up to this step that are neither among the newest nor the best.

        Later ones were skipped by a resumed run, which will replace them.
        """
        complete: dict[int, tuple[Path, dict[str, Any]]] = {}
        for number, folder in self._candidates():
            try:
                if number <= step:
                    complete[number] = folder, _read_manifest(folder, number)
            except (CheckpointError, OSError):
                # An incomplete checkpoint does not count as kept, and may not be ours to remove.
                continue
        keep = set(list(complete)[-self.keep :])
        # Only scores of the same column can be compared.
        scores = {k: m["score"] for k, (_, m) in complete.items() if m["best"] == self.best and m["score"] is not None}
        if self.best is not None and scores:
            keep.add((max if self.greater_is_better else min)(scores, key=scores.__getitem__))
        for number, (folder, _) in complete.items():
            if number not in keep:
                _discard(folder)

    def _newest_complete(self) -> str:
        for step, folder in reversed(self._candidates()):
            if _is_complete(folder, step):
                return f"the newest complete checkpoint is {folder.name}"
        return "there is no complete checkpoint"


def _read_manifest(folder: Path, step: int) -> dict[str, Any]:
    """Return the manifest of a checkpoint, after a check of the names and sizes of its files but not of their content."""
    try:
        with open(folder / _MANIFEST, "rb") as file:
            manifest = json.loads(file.read())
    except FileNotFoundError:
        raise CheckpointError(f"it has no {_MANIFEST}: the save was interrupted, or the file was removed") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its {_MANIFEST} is damaged: {error}") from error
    if not isinstance(manifest, dict) or type(manifest.get("format")) is not int:
        raise CheckpointError(f"its {_MANIFEST} is damaged: it is not a manifest")
    if manifest["format"] > _FORMAT:
        raise CheckpointError(
            f"it has format {manifest['format']}, and this version of mlopt reads formats up to {_FORMAT}: update mlopt"
        )
    if manifest.pop("sha256", None) != _digest(manifest):
        raise CheckpointError(f"its {_MANIFEST} is damaged: its SHA-256 differs")
    if manifest["step"] != step:
        raise CheckpointError(f"its {_MANIFEST} is of step {manifest['step']}: the folder was renamed")
    for name, expected in manifest["files"].items():
        try:
            size = (folder / name).stat().st_size
        except FileNotFoundError:
            raise CheckpointError(f"its {name} is missing") from None
        if size != expected["bytes"]:
            raise CheckpointError(f"its {name} has {size} of {expected['bytes']} bytes")
    return manifest


def _check(folder: Path, step: int) -> None:
    for name, expected in _read_manifest(folder, step)["files"].items():
        if _hash(folder / name) != expected["sha256"]:
            raise CheckpointError(f"its {name} is damaged: its SHA-256 differs")


def _is_complete(folder: Path, step: int) -> bool:
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
    """Rename a staged folder to its target; an existing target is renamed first, to a name that is still recognised."""
    replaced = target.with_name(_REPLACED + target.name)
    if target.is_dir():
        os.rename(target, replaced)
    try:
        os.rename(staging, target)
    except OSError:
        if replaced.is_dir():
            os.rename(replaced, target)
        raise


def _finish_replacement(target: Path) -> None:
    """Finish an interrupted replacement: restore the replaced folder unless its replacement is complete."""
    replaced, step = target.with_name(_REPLACED + target.name), int(target.name.partition("-")[2])
    if not replaced.is_dir():
        return
    if not target.is_dir():
        os.rename(replaced, target)
    elif _is_complete(replaced, step) and not _is_complete(target, step):
        _remove(target)
        os.rename(replaced, target)
    else:
        _remove(replaced)


def _discard(folder: Path) -> None:
    """Rename a folder, then remove it; only warn if this fails."""
    try:
        if folder.is_dir():
            renamed = folder.with_name(_PARTIAL + folder.name.removeprefix(_REPLACED))
            _remove(renamed)
            os.rename(folder, renamed)
            _remove(renamed)
    except OSError as error:
        warnings.warn(
            f"{folder} is no longer needed but cannot be removed: {_explain(error)}", CheckpointWarning, stacklevel=3
        )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _explain(error: Exception) -> str:
    """Return the message of an error, with the file and the remedy if it is an OSError."""
    if not isinstance(error, OSError):
        return str(error)
    place = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{place}; {_REMEDIES.get(error.errno or 0, 'give another folder')}"
