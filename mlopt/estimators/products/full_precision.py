"""Full precision for derivatives that are subtracted from one another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["full_precision"]


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Disable autocast and TF32 inside: the step of a difference would divide their rounding.

    PyTorch allows TF32 in convolutions on a GPU by default. It rounds float32 to 10 bits, which is as coarse as the step.

    Args:
        device: the device of the variables.
    """
    # Entering an autocast region takes longer than to see that there is none to leave.
    autocast = torch.is_autocast_enabled(device.type)
    with torch.autocast(device.type, enabled=False) if autocast else contextlib.nullcontext(), _without_tf32():
        yield


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Disable TF32 by the settings that the process already uses, since PyTorch refuses to mix the old ones with the new."""
    try:
        matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        # Setting the present value would still mark it as set.
        old = {"matmul": matmul != "highest", "convolution": convolution}
    except RuntimeError:
        with _ieee():
            yield
        return
    try:
        if old["matmul"]:
            torch.set_float32_matmul_precision("highest")
        if old["convolution"]:
            torch.backends.cudnn.allow_tf32 = False
        yield
    finally:
        if old["matmul"]:
            torch.set_float32_matmul_precision(matmul)
        if old["convolution"]:
            torch.backends.cudnn.allow_tf32 = convolution


@contextlib.contextmanager
def _ieee() -> Iterator[None]:
    """Disable TF32 by the settings of PyTorch 2.9."""
    backends: Any = torch.backends
    places = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision
