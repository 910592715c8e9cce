"""Keep what is computed from molecules in the user's cache folder, so that a corpus is featurised once."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..files import DataError
from .graphs import import_extra

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

__all__ = ["FEWEST", "cached", "folder"]

#: The fewest molecules that are cached: fewer are featurised in seconds.
FEWEST = 2_000
_VARIABLE, _NOWHERE = "MLOPT_CACHE", "none"
_PACKAGES = ("rdkit", "torch_geometric", "sklearn")


def folder() -> Path | None:
    """Return the folder of the cache: $MLOPT_CACHE, else the user's cache folder; None if $MLOPT_CACHE is "none"."""
    named = os.environ.get(_VARIABLE, "")
    if named == _NOWHERE:
        return None
    root = Path(named) if named else Path(import_extra("platformdirs").user_cache_dir("mlopt", appauthor=False))
    return root / "molecules"


def cached(feature: str, smiles: Sequence[str], compute: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """Return the tensors of a feature of molecules, from the cache if it holds them.

    A file of the cache is named after the feature and a hash of the SMILES, of this package's code and of the versions of RDKit,
    torch-geometric and scikit-learn. A change of one of them makes another file. Any file can be deleted at any time.

    Args:
        feature: the name of the feature, with its settings.
        smiles: the molecules; fewer than `FEWEST` are not cached.
        compute: computes the tensors.

    Warns:
        UserWarning: a file is damaged, and the feature is computed again; or the folder cannot be written to.
    """
    place = folder() if len(smiles) >= FEWEST else None
    if place is None:
        return compute()
    file = place / f"{_key(feature, smiles)}.safetensors"
    try:
        return _read(file)
    except FileNotFoundError:
        pass
    except (OSError, SafetensorError, DataError) as error:
        warnings.warn(f"{file}: not a complete cache file ({error}); it is computed again", stacklevel=2)
    tensors = compute()
    try:
        _write(file, tensors, feature)
    except (OSError, SafetensorError) as error:
        warnings.warn(
            f"{place}: {error}; the features are computed again in the next run; set {_VARIABLE} to a folder that can be "
            f"written to, or to {_NOWHERE!r}",
            stacklevel=2,
        )
    return tensors


def _key(feature: str, smiles: Sequence[str]) -> str:
    versions = [import_extra(package).__version__ for package in _PACKAGES]
    text = json.dumps([_code(), versions, feature, list(smiles)])
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def _code() -> str:
    """Return a hash of the code of this package: a version that cannot be forgotten."""
    root = Path(__file__).parent
    files = sorted(root.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _read(file: Path) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as stream:
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a mapping)
        stored = (stream.metadata() or {}).get("digest")
    if stored != _digest(tensors):
        raise DataError("its content does not match its digest")
    return tensors


def _write(file: Path, tensors: Mapping[str, Tensor], feature: str) -> None:
    """Write a file whole or not at all, in a folder of its own until then: another process may write the same file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".") as own:
        staged = Path(own) / file.name
        save_file(dict(tensors), staged, metadata={"feature": feature, "digest": _digest(tensors)})
        os.replace(staged, file)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().data)
    return digest.hexdigest()
