"""The page on tasks: its code runs unchanged, learns, and stays short."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """The names that the page's code defines."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in BLOCKS:
        exec(compile(block, "docs/tasks.md", "exec"), names)
    return names


def test_the_start_learns_what_tasks_have_in_common(names: dict[str, Any]) -> None:
    """Five examples do not determine five variables; the common slopes are 1."""
    losses = names["imaml"].history.column("meta/loss")
    assert losses[-1] < 0.5 * losses[0]
    assert float((names["meta"].weight.detach() - 1).norm()) < 0.3
    assert names["adapted"].weight.shape == (1, 4)


def test_the_learned_rates_help(names: dict[str, Any]) -> None:
    losses = names["maml"].history.column("meta/loss")
    assert losses[-1] < 0.3 * losses[0]
    rates = torch.cat([rate.detach().reshape(-1) for rate in names["meta_sgd"]["meta"].module.rates])
    assert float((rates - 0.05).abs().min()) > 0.01


def test_the_learners_are_those_after_the_virtual_steps(names: dict[str, Any]) -> None:
    task, meta = 3, names["meta_sgd"]["meta"].module
    own = [p.detach().clone().requires_grad_() for p in meta.start.parameters()]
    for inputs, targets in names["batches"]:
        loss = (torch.nn.functional.linear(inputs[task], *own).squeeze(-1) - targets[task]).square().mean()
        slopes = torch.autograd.grad(loss, own)
        own = [(p - r * g).detach().requires_grad_() for p, r, g in zip(own, meta.rates, slopes, strict=True)]
    learners = list(names["learners"].values())
    assert [len(value) for value in learners] == [64, 64]
    for value, expected in zip(learners, own, strict=True):
        torch.testing.assert_close(value[task], expected, rtol=1e-4, atol=1e-5)


def test_each_example_has_fewer_than_forty_lines_of_code() -> None:
    for block in BLOCKS:
        lines = [line for line in block.splitlines() if line.strip() and not line.startswith(("import", "from"))]
        assert len(lines) < 40
