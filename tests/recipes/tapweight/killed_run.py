"""A short run of TapWeight with the state that a resume must restore: dropout, warm starts, AdamW, schedulers, files."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.figure  # noqa: F401  # imported once, not by each process that is forked: with the picture
import torch
import torch._dynamo  # with the first optimiser
from tapweight_cases import F64, Reconstruct, Sum
from torch import Tensor, nn

import mlopt
from mlopt.recipes import TapWeight
from mlopt.recipes.tapweight.encoder import Encoder
from mlopt.recipes.tapweight.settings import Settings

STEPS = 16


class Dropping(Encoder):
    width = 4

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 4, dtype=F64), nn.BatchNorm1d(4, dtype=F64)

    def forward(self, batch: Tensor) -> Tensor:
        return nn.functional.dropout(self.norm(self.layer(batch)).tanh(), 0.3, self.training)


def main(folder: Path, began: Path) -> None:
    """Run to the end from the folder's newest checkpoints; save the result there."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    splits = {split: list(torch.randn(24, 3, dtype=F64)) for split in ("train", "valid", "test")}
    recipe = TapWeight(
        Dropping(),
        [Reconstruct("square", 2.0), Reconstruct("plain", 1.0), Reconstruct("constant", 0.0)],
        Sum(splits),
        list(torch.randn(50, 3, dtype=F64)),
        settings=Settings(
            every=2,
            batch_size=8,
            task_batch_size=8,
            valid_batch_size=8,
            warmup=0.2,
            measurements=4,
            epochs=2,
            rehearsal_steps=6,
            weight_decay=0.01,
            lr_schedule="cosine",
        ),
        estimator=mlopt.ConjugateGradient(iterations=2, warm_start=True, damping=1e-2),
        seed=3,
    )
    recipe.prepare()
    began.touch()  # moments are counted from here
    log = mlopt.CSVLogger(folder / "log.csv")
    result = recipe.fit(
        STEPS,
        methods=["direct", "equal", "rehearsal", "tapweight"],
        checkpoint=mlopt.Checkpoints(folder / "checkpoints", every=1),
        resume=True,
        callbacks=[log],
        progress=False,
    )
    result.save(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
