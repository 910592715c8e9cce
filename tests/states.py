"""Comparison of two states of runs."""

from __future__ import annotations

import math
from typing import Any

import torch


def assert_same_state(a: Any, b: Any, place: str = "state") -> None:
    """Assert that two trees of state are bit-identical."""
    assert type(a) is type(b), place
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, place
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), place
    elif isinstance(a, dict):
        assert list(a) == list(b), place
        for key in a:
            assert_same_state(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), place
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{place}[{k}]")
    elif isinstance(a, float) and math.isnan(a):
        assert math.isnan(b), place
    else:
        assert repr(a) == repr(b), place
