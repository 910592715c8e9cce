"""Runs of TapWeight that several processes share; every case is a function of a folder, and returns plain values."""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from killed_run import Dropping
from tapweight_cases import F64, Encoder, Reconstruct, Sum
from torch import Tensor, nn
from torch.distributed import get_rank

import mlopt
from mlopt import notices
from mlopt.recipes import TapWeight
from mlopt.recipes.tapweight.methods import Adapted, Method
from mlopt.recipes.tapweight.settings import Settings

SETTINGS = Settings(
    every=2,
    batch_size=8,
    task_batch_size=8,
    valid_batch_size=8,
    measurements=2,
    epochs=2,
    rehearsals=2,
    rehearsal_steps=4,
    finetunings=2,
)
METHODS = ("direct", "equal", "pcgrad", "random_search", "frozen", "bilevel", "tapweight", "rehearsal")


def recipe(encoder: Any = Dropping, power: float = 0.0, seed: int = 0) -> TapWeight:
    """Return a recipe whose encoder has dropout and a batch norm, and whose objectives draw masks."""
    torch.manual_seed(seed)
    splits = {split: list(torch.randn(24, 3, dtype=F64)) for split in ("train", "valid", "test")}
    corpus = list(torch.randn(50, 3, dtype=F64))
    objectives = [Reconstruct("square", 2.0), Reconstruct("plain", 1.0), Reconstruct("constant", power)]
    return TapWeight(encoder(), objectives, Sum(splits), corpus, settings=SETTINGS, seed=3)


def values_of(result: Any) -> dict[str, Any]:
    """Return all numbers of a result."""
    models = {f"model {k}": run.model.state_dict() for k, run in enumerate(result.finetuned)}
    return {
        "weights": result.weights,
        "scores": result.scores,
        "signals": {name: (signal.mean, signal.error) for name, signal in result.signals.items()},
        "history": list(result.history),
        "encoder": dict(result.encoder.state_dict()),
        **{name: dict(state) for name, state in models.items()},
    }


def whole(folder: Path) -> dict[str, Any]:
    """Return the values of a run of all kinds of methods."""
    return values_of(recipe().fit(8, methods=METHODS, progress=False))


def signalled(folder: Path) -> Any:
    """Return the end of a run whose first process receives a signal while the main method adapts the encoder."""

    class Kill(mlopt.Callback):
        def on_step_end(self, run: Any) -> None:
            if run.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    try:
        return fitted(folder, callbacks=[Kill()])
    except mlopt.Interrupted:
        return "interrupted"


def fitted(folder: Path, made: TapWeight | None = None, **options: Any) -> dict[str, Any]:
    """Return the values of a run with checkpoints, of which all or some may be in the folder."""
    checkpoints = mlopt.Checkpoints(folder, every=2)
    methods = ("equal", "rehearsal", "tapweight")
    made = made or recipe()
    return values_of(
        made.fit(8, methods=methods, checkpoint=checkpoints, resume=folder.exists(), progress=False, **options)
    )


class Uneven(Reconstruct):
    """An objective that fails in the second process, once the first one has begun a phase that lasts."""

    def loss(self, encoder: nn.Module, head: nn.Module, view: Tensor) -> Tensor:
        if get_rank() == 1:
            raise KeyError("no such example")
        time.sleep(0.3)
        return super().loss(encoder, head, view)


def cut_short(folder: Path) -> Any:
    """Return the error of a run whose second process fails, while the first one computes; notices are read in each step."""
    notices._PAUSE = 0.0
    made = recipe()
    made.prepare()
    for objective in made.objectives:
        objective.__class__ = Uneven
    return failed(lambda: fitted(folder, made))


class Fragile(Reconstruct):
    """An objective whose loss is not finite in a rehearsal of its own by the second process."""

    def loss(self, encoder: nn.Module, head: nn.Module, view: Tensor) -> Tensor:
        loss = super().loss(encoder, head, view)
        return loss * (math.inf if self.fails and get_rank() == 1 else 1.0)

    fails = False


def diverging(folder: Path) -> Any:
    """Return the error of a run in which the second process fails."""
    made = recipe()
    made.prepare()
    for objective in made.objectives:
        objective.__class__ = Fragile
        objective.fails = True
    return failed(lambda: made.fit(8, methods=["rehearsal"], progress=False))


def differing(folder: Path) -> Any:
    return failed(lambda: recipe(seed=get_rank()).fit(8, methods=["equal"], progress=False))


def other_labels(folder: Path) -> Any:
    made = recipe()
    made.task.splits["valid"][get_rank()] += 1.0  # type: ignore[index]
    return failed(lambda: made.fit(8, methods=["equal"], progress=False))


class Other(Method):
    """A method whose encoder is of another architecture."""

    name, title, summary = "other", "another encoder", "Not pretrained."

    def passes(self, experiment: Any) -> int:
        return 0

    def adapt(self, experiment: Any, callbacks: Any = ()) -> Adapted:
        return Adapted(encoder=Encoder())


def replaced(folder: Path) -> Any:
    return failed(lambda: recipe().fit(8, methods=[Other()], progress=False))


def failed(run: Any) -> tuple[str, str]:
    try:
        run()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""
