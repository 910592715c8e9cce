"""States, folders of checkpoints and damages that the tests of saving share."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch

from mlopt.errors import CheckpointWarning
from mlopt.solving import serialization
from mlopt.solving.checkpoints import Checkpoints


def through(state, folder=None):
    """Write a state to files and read it back."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        serialization.write(Path(place), state)
        return serialization.read(Path(place))


FILES = ("manifest.json", "state.json", "tensors.safetensors")


def state_of(step, length=20):
    """Return a state whose every part encodes its step."""
    return {"step": step, "weights": torch.full((length,), step, dtype=torch.int64), "log": [{"x": float(step)}] * 3}


def is_of(state, step, length=20):
    expected = state_of(step, length)
    return torch.equal(state.pop("weights"), expected.pop("weights")) and state == expected


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def saved(folder, *steps, scores=None, **options):
    """Return checkpoints after saving these steps, in this order."""
    checkpoints = Checkpoints(folder, **options)
    for k, step in enumerate(steps):
        checkpoints.save(step, state_of(step), scores[k] if scores else None)
    return checkpoints


def newest(checkpoints):
    """Return the step of the newest complete checkpoint and the warnings raised; check its content."""
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
