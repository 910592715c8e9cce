"""The device of the tests that need a GPU, and problems that are moved there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch

import mlopt

# With this workspace, cuBLAS is deterministic; it reads the variable when it is loaded.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

#: With MLOPT_CUDA_DEVICE=cpu the tests run without a GPU, to see that they can pass; they then compare the CPU with itself.
DEVICE = torch.device(os.environ.get("MLOPT_CUDA_DEVICE", "cuda"))
CPU = torch.device("cpu")
#: For `pytestmark` of a module whose tests need a GPU.
needs_cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def moved(problem: mlopt.Problem) -> mlopt.Problem:
    """Move the modules of a problem to the device, in place; return the problem."""
    for level in problem:
        level.module.to(DEVICE)
    return problem


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Inside the context, kernels are deterministic, and one that cannot be raises an error."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
