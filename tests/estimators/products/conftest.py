"""Compiled products without a compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from mlopt.estimators.products import traced


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replay recordings without a compiler, which takes seconds; return a list of the vectors that each product takes."""
    calls: list[Any] = []

    def stand_in(graph: Any, arguments: Any) -> Callable[..., Any]:
        def run(*tensors: Tensor) -> Any:
            calls.append(tensors)
            return graph(*tensors)

        return run

    monkeypatch.setattr(traced, "compiled", stand_in)
    return calls
