"""The page on runs: its code runs unchanged, and its statements about these runs hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import mlopt

PAGE = Path(__file__).parents[2] / "docs" / "runs.md"


def test_its_runs_are_logged_stopped_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    history = names["solution"].history
    assert history.column("decay/loss")[-1] < history.column("decay/loss")[0]
    assert len(history.column("evaluation/largest")) == len(history) // 10
    assert (tmp_path / "runs/first/log.csv").read_text().count("\n") == len(history) + 1
    step, _, state = mlopt.Checkpoints("runs/second").newest()  # type: ignore[misc]
    whole = names["problem"]()
    rows = list(mlopt.solve(whole, 40, seed=0, progress=False).history)
    assert (step, state["history"]) == (40, rows)
    assert torch.equal(state["engine"]["levels"]["model"]["module"]["state"]["weight"], whole["model"].module.weight)
