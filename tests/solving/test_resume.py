"""A run that is gone on with from any of its checkpoints is, to the last bit, the run that was not interrupted."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from states import assert_same_state
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset

import mlopt
from mlopt import Level, Problem
from mlopt.solving import archive

STEPS = 7


class Augmented(Dataset):
    """Examples that draw from torch's and numpy's generators when they are read."""

    def __init__(self, count: int) -> None:
        self.inputs = torch.linspace(-1, 1, 3 * count).reshape(count, 3)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.inputs[index] + 0.1 * torch.randn(3) + float(np.random.rand())


class Net(nn.Module):
    """A network whose steps draw (dropout), change buffers (batch normalisation), and leave a buffer out of its state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += len(x)
        return self.last(nn.functional.dropout(self.norm(self.first(x)).tanh(), 0.3, self.training)).squeeze(1)


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2))

    def forward(self) -> torch.Tensor:
        return self.logits.softmax(0)


class Probe(mlopt.Callback):
    """Calls `hypergradient`, which draws batches of its own, and keeps what it got."""

    def __init__(self) -> None:
        self.found: list[torch.Tensor] = []

    def on_step_end(self, run: Any) -> None:
        self.found.append(mlopt.hypergradient(run.problem).gradient["logits"])

    def state_dict(self) -> dict[str, Any]:
        return {"found": self.found}

    def load_state_dict(self, state: Any) -> None:
        self.found = list(state["found"])


def build(kind: str) -> Problem:
    """Return a problem of two or three levels with much that carries over from step to step."""
    torch.manual_seed(5)

    def outer(own, batch, *, net):
        return {"loss": net(batch).square().mean() + own().square().sum(), "first": own()[0]}

    def mixture(own, batch, *, weights):
        losses = [lambda: (own(batch) - batch.sum(1)).square().mean(), lambda: own(batch).abs().mean()]
        return mlopt.Mixture(losses, weights="weights")

    def plain(own, batch, *, weights):
        w = weights()
        return w[0] * (own(batch) - batch.sum(1)).square().mean() + w[1] * own(batch).abs().mean()

    generator = torch.Generator().manual_seed(11)
    loader = DataLoader(Augmented(11), batch_size=3, shuffle=True, generator=generator)
    estimators = {
        "streamed": mlopt.Identity(streamed=True),
        "warm": mlopt.ConjugateGradient(iterations=2, warm_start=True, damping=1.0),
        "curvature": mlopt.Neumann(
            terms=3, step_size=0.1, curvature_data=DataLoader(Augmented(8), batch_size=4, shuffle=True)
        ),
        "unrolled": mlopt.Unrolled(steps=2),
        "fp16": mlopt.FiniteDifference(),
    }
    decay = partial(AdamW, lr=0.02, weight_decay=0.1)
    return Problem(
        Level(
            "weights", Weights(), outer, data=DataLoader(Augmented(6), batch_size=4), optimizer=partial(Adam, lr=0.05)
        ),
        Level(
            "net",
            Net(),
            mixture if kind == "streamed" else plain,
            data=loader,
            optimizer=partial(SGD, lr=0.05, momentum=0.9) if kind == "unrolled" else decay,
            scheduler={
                "streamed": partial(OneCycleLR, max_lr=0.1, total_steps=3 * STEPS + 4),
                "warm": partial(CosineAnnealingLR, T_max=10),
                "curvature": partial(ReduceLROnPlateau, patience=0),
            }.get(kind),
            steps=3,
            warmup=2,
            accumulate=2 if kind == "warm" else 1,
            clip=1.0,
            precision="fp16" if kind == "fp16" else None,
            estimator=estimators[kind],
        ),
    )


def evaluate(problem: Problem) -> dict[str, float]:
    return {"size": float(problem["weights"].module().detach().norm()) + float(torch.rand(()))}


def play(kind: str, folder: Path, steps: int, *, resume: bool, every: int = 1) -> dict[str, Any]:
    """Return all that a run leaves behind."""
    problem, probe = build(kind), Probe()
    stopping = mlopt.EarlyStopping("evaluation/size", patience=100)
    log = mlopt.CSVLogger(folder / "log.csv")
    solution = mlopt.solve(
        problem,
        steps,
        seed=3,
        checkpoint=mlopt.Checkpoints(folder, every=every, keep=100),
        resume=resume,
        callbacks=[probe, stopping, log],
        evaluate=evaluate,
        evaluate_every=2,
        log_every=3,
        progress=False,
    )
    return {
        "modules": [t for level in problem for t in (*level.module.parameters(), *level.module.buffers())],
        "probe": probe.found,
        "history": list(solution.history),
        "log": (folder / "log.csv").read_text(),
        "drawn next": torch.rand(()),
        "saved": archive.read(folder / f"step-{steps:08d}"),
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what an uninterrupted run of each kind leaves behind, and its folder; each is run once."""
    runs: dict[str, Any] = {}

    def get(kind: str) -> Any:
        if kind not in runs:
            folder = tmp_path_factory.mktemp(kind)
            runs[kind] = play(kind, folder, STEPS, resume=False), folder
        return runs[kind]

    return get


@pytest.mark.parametrize("kind", ["streamed", "warm", "curvature", "unrolled", "fp16"])
@pytest.mark.parametrize("cut", [0, 2, 3, 6, STEPS])
def test_gone_on_with_from_a_checkpoint_is_the_same_run(kind: str, cut: int, whole: Any, tmp_path: Path) -> None:
    expected, _ = whole(kind)
    if cut:
        play(kind, tmp_path, cut, resume=False)
    assert_same_state(play(kind, tmp_path, STEPS, resume=True), expected)
