"""States, folders of checkpoints and comparisons that the tests of saving share."""

from __future__ import annotations

import struct
import tempfile
import warnings
from collections import deque
from pathlib import Path

import numpy as np
import torch

from mlopt.errors import CheckpointWarning
from mlopt.solving import serialization
from mlopt.solving.checkpoints import Checkpoints


def same(one, other):
    """Return whether two trees are of the same types, order, shapes and bits."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and bits(one) == bits(other)
    if isinstance(one, np.ndarray | np.generic):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, float):
        return struct.pack("d", one) == struct.pack("d", other)
    if isinstance(one, dict):
        return len(one) == len(other) and all(
            same(a, b) and same(one[a], other[b]) for a, b in zip(one, other, strict=True)
        )
    if isinstance(one, list | tuple | deque):
        return (
            len(one) == len(other)
            and all(map(same, one, other))
            and getattr(one, "maxlen", 0) == getattr(other, "maxlen", 0)
        )
    return one == other


def bits(tensor):
    return tensor.detach().contiguous().clone().untyped_storage().tolist()


def through(state, folder=None):
    """Return what is read of what is written."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        serialization.write(Path(place), state)
        return serialization.read(Path(place))


FILES = ("manifest.json", "state.json", "tensors.safetensors")


def state_of(step, length=20):
    """Return a state of which every part says its step."""
    return {"step": step, "weights": torch.full((length,), step, dtype=torch.int64), "log": [{"x": float(step)}] * 3}


def is_of(state, step, length=20):
    expected = state_of(step, length)
    return torch.equal(state.pop("weights"), expected.pop("weights")) and state == expected


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def saved(folder, *steps, scores=None, **options):
    """Return checkpoints that have saved these steps, in this order."""
    checkpoints = Checkpoints(folder, **options)
    for k, step in enumerate(steps):
        checkpoints.save(step, state_of(step), scores[k] if scores else None)
    return checkpoints


def newest(checkpoints):
    """Return the step of the newest complete checkpoint, its content checked, and the warnings that came."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step, folder, state = checkpoints.newest()
    assert int(folder.name.split("-")[-1]) == step
    assert is_of(state, step)
    assert all(warning.category is CheckpointWarning for warning in caught)
    return step, [str(warning.message) for warning in caught]


def flip(path, place, mask):
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= mask
    path.write_bytes(content)


def delete(path, *_):
    path.unlink()
