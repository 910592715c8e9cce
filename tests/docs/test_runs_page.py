"""The page on runs: its code runs unchanged, and its statements about these runs hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import mlopt

PAGE = Path(__file__).parents[2] / "docs" / "runs.md"


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the page's code defines."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    return names


def test_its_runs_are_logged_stopped_and_resumed(names: dict[str, Any], tmp_path: Path) -> None:
    history = names["solution"].history
    assert history.column("decay/loss")[-1] < history.column("decay/loss")[0]
    assert len(history.column("evaluation/largest")) == len(history) // 10
    assert (tmp_path / "runs/first/log.csv").read_text().count("\n") == len(history) + 1
    step, _, state = mlopt.Checkpoints("runs/second").newest()  # type: ignore[misc]
    whole = names["problem"]()
    rows = list(mlopt.solve(whole, 40, seed=0, progress=False).history)
    assert (step, state["history"]) == (40, rows)
    assert torch.equal(state["engine"]["levels"]["model"]["module"]["state"]["weight"], whole["model"].module.weight)


def _distinct(batches: list[torch.Tensor]) -> list[list[float]]:
    """Return the batches in order, each once: a loss is evaluated several times on one."""
    values = [batch.tolist() for batch in batches]
    return [value for k, value in enumerate(values) if k == 0 or value != values[k - 1]]


def test_levels_share_batches_whose_order_changes_with_the_epoch(names: dict[str, Any]) -> None:
    inner, outer = (_distinct(names["seen"][level]) for level in ("mean", "scale"))
    assert inner == outer
    assert len(inner) == 12
    epochs = [sorted(x for batch in inner[k : k + 5] for x in batch) for k in (0, 5)]
    assert epochs == [list(range(40))] * 2
    assert inner[:5] != inner[5:10]


def test_the_meta_gradient_is_that_of_steps_by_hand(names: dict[str, Any]) -> None:
    problem = names["maml"]
    start = [parameter.detach().clone().requires_grad_() for parameter in problem["initialisation"].module.parameters()]
    weights, (query, support) = start, (names["task"](20, 0), names["task"](10, 1))
    for _ in range(3):
        loss = (torch.nn.functional.linear(support[0], *weights) - support[1]).square().mean()
        weights = [
            w - 0.1 * g for w, g in zip(weights, torch.autograd.grad(loss, weights, create_graph=True), strict=True)
        ]
    loss = (torch.nn.functional.linear(query[0], *weights) - query[1]).square().mean()
    for ours, expected in zip(names["meta_gradient"].values(), torch.autograd.grad(loss, start), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
