"""The settings of TF32 inside a difference, and after it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

CODE = """
import torch, warnings
from mlopt.estimators.products import full_precision
warnings.simplefilter("error")
backends = torch.backends
places = {{"matmul": backends.cuda.matmul, "convolution": backends.cudnn.conv, "recurrent": backends.cudnn.rnn}}
def tf32():
    return [name for name, place in places.items() if place.fp32_precision == "tf32"]
{setting}
before, states = tf32(), [place.fp32_precision for place in places.values()]
with full_precision(torch.device("cpu")):
    inside = tf32()
assert states == [place.fp32_precision for place in places.values()]
print(before, inside)
"""


@pytest.mark.skipif(
    not hasattr(torch.backends.cudnn, "conv"), reason="the settings that are read came with PyTorch 2.9"
)
@pytest.mark.parametrize(
    ("setting", "allowed"),
    [
        ("torch.set_float32_matmul_precision('high')", "['matmul', 'convolution', 'recurrent']"),
        ("backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32 = True, False", "['matmul']"),
        ("backends.fp32_precision = 'tf32'", "['matmul', 'convolution', 'recurrent']"),
    ],
)
def test_tf32_is_off_inside_and_as_before_afterwards(setting: str, allowed: str) -> None:
    """In a process of its own: PyTorch does not forget which settings were used."""
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(setting=setting)], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == (f"{allowed} []\n", "")
