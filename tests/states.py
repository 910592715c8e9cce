"""Comparison of the states of two runs."""

from __future__ import annotations

import struct
from collections import deque
from typing import Any

import numpy as np
import torch


def assert_same_state(a: Any, b: Any, place: str = "state") -> None:
    """Assert that two trees of state have the same types, order, shapes and bits."""
    assert type(a) is type(b), place
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), place
        assert torch.equal(*(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for x in (a, b))), place
    elif isinstance(a, np.ndarray | np.generic):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), place
    elif isinstance(a, dict):
        assert_same_state(list(a), list(b), f"the keys of {place}")
        for key in a:
            assert_same_state(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, list | tuple | deque):
        assert (len(a), getattr(a, "maxlen", 0)) == (len(b), getattr(b, "maxlen", 0)), place
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{place}[{k}]")
    elif isinstance(a, float):
        assert struct.pack("d", a) == struct.pack("d", b), place
    else:
        assert a == b, place
