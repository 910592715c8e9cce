"""The final finetuning of an adapted encoder: the epoch is chosen on the validation split, the test split is scored once."""

from __future__ import annotations

import math
import time
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import attrs
import torch

import mlopt
from mlopt.problem import to_device
from mlopt.rng import preserved, seed_everything

from .models import Finetuning, task_losses
from .task import SCORED_AT_ONCE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from .encoder import Encoder
    from .settings import Settings
    from .task import Split, Task

__all__ = ["Finetuned", "FinetuningCost", "Score", "finetune", "finetuning_cost", "unfinetuned"]

#: Steps that are timed.
_TIMED = 4


@attrs.frozen
class Score:
    """The task's metric of a finetuned encoder.

    Attributes:
        valid: on the validation split, by which the epoch was chosen.
        test: on the test split, computed once, at that epoch.
        epoch: the epoch chosen, from 1.
    """

    valid: float
    test: float
    epoch: int


@attrs.frozen(eq=False)
class Finetuned:
    """A finetuned model and its score.

    Attributes:
        model: the encoder and the task's head, at the epoch chosen.
        score: the task's metric of this model.
        measures: every metric of this model on the test split that is defined, by task and by name.
    """

    model: Finetuning
    score: Score
    measures: dict[str, dict[str, float]] = attrs.field(factory=dict)


class _BestEpoch(mlopt.Callback):
    """Score the validation split after each epoch, and keep the variables of the best one; stop if none is better for long."""

    def __init__(self, model: Finetuning, task: Task, interval: int, patience: int) -> None:
        self._model, self._task, self._interval, self._patience = model, task, interval, patience
        self.valid, self.epoch = math.nan, 0
        self._state: dict[str, Tensor] = {}

    def on_step_end(self, run: mlopt.solving.Run) -> None:
        if run.step % self._interval:
            return
        valid = self._task.score(self._model.encoder, self._model.head, "valid")
        better = valid > self.valid if self._task.greater_is_better else valid < self.valid
        if math.isnan(self.valid) or better:
            self.valid, self.epoch = valid, run.step // self._interval
            self._state = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}
        elif self._patience and run.step // self._interval - self.epoch >= self._patience:
            run.stop(f"no better validation score for {self._patience} epochs")

    def state_dict(self) -> dict[str, Any]:
        return {"valid": self.valid, "epoch": self.epoch, "state": self._state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.valid, self.epoch, self._state = state["valid"], state["epoch"], dict(state["state"])

    def restore(self) -> None:
        """Load the variables of the best epoch."""
        self._model.load_state_dict(self._state)


def finetune(
    encoder: Encoder, task: Task, settings: Settings, *, seed: int, solve: Callable[..., mlopt.Solution]
) -> Finetuned:
    """Finetune a copy of the encoder on the task.

    Args:
        encoder: not changed.
        task: the task.
        settings: the epochs, the learning rate of Adam, the batch size, the precision, `patience` and `freeze_encoder`.
        seed: the seed of the head and of the order of batches.
        solve: `mlopt.solve`, or a function that solves the problem as a phase of an experiment.

    Returns:
        The model of the epoch with the best validation score, and its scores.
    """
    model, interval = unfinetuned(encoder, task, settings, seed), _interval(task, settings)
    level = mlopt.Level(
        "finetuning",
        model,
        partial(_loss, task),
        data=task.loader("train", settings.task_batch_size, shuffle=True),
        optimizer=partial(torch.optim.Adam, lr=settings.finetune_lr),
        precision=settings.autocast,
    )
    best = _BestEpoch(model, task, interval, settings.patience)
    solve(mlopt.Problem(level), settings.epochs * interval, callbacks=[best], seed=seed)
    best.restore()
    test = task.score(model.encoder, model.head, "test")
    measures = task.evaluate(model.encoder, model.head, "test")
    return Finetuned(model, Score(valid=best.valid, test=test, epoch=best.epoch), measures)


@attrs.frozen(kw_only=True)
class FinetuningCost:
    """The cost of one finetuning.

    Attributes:
        steps: its steps.
        passes: evaluations of the encoder on a batch: those of the steps and of the scores.
        seconds: a rough time.
    """

    steps: int
    passes: int
    seconds: float


def finetuning_cost(encoder: Encoder, task: Task, settings: Settings, *, seed: int) -> FinetuningCost:
    """Return the cost of `finetune`, at most: it may stop before. The time is estimated from a few steps of a copy.

    Args:
        encoder, task, settings, seed: see `finetune`; nothing random outside is changed.
    """
    device = next(encoder.parameters()).device
    with preserved({device}):
        model = unfinetuned(encoder, task, settings, seed)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        batches = [*islice(task.loader("train", settings.task_batch_size, shuffle=True), _TIMED)]
        begin = time.perf_counter()
        for batch in batches:
            loss = _loss(task, model, to_device(batch, device))
            gradient = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            float(gradient[-1].sum())  # waits for the device
        step = (time.perf_counter() - begin) / len(batches)
    steps = settings.epochs * _interval(task, settings)
    scored: dict[Split, int] = {"valid": settings.epochs, "test": 2}  # how often each split is scored
    sizes = {split: len(task.splits[split]) for split in scored}
    chunks = sum(count * math.ceil(sizes[split] / SCORED_AT_ONCE) for split, count in scored.items())
    # A forward pass takes about a third of a step.
    forward = step / 3 * sum(count * sizes[split] for split, count in scored.items()) / settings.task_batch_size
    return FinetuningCost(steps=steps, passes=steps + chunks, seconds=steps * step + forward)


def unfinetuned(encoder: Encoder, task: Task, settings: Settings, seed: int) -> Finetuning:
    """Return the model before its first step."""
    seed_everything(seed)
    model = Finetuning(encoder, task).to(next(encoder.parameters()).device)
    # The encoders of all methods are finetuned in the same mode.
    model.train()
    if settings.freeze_encoder:
        model.encoder.requires_grad_(False).eval()
    return model


def _interval(task: Task, settings: Settings) -> int:
    """Return the steps of an epoch."""
    return max(1, len(task.splits["train"]) // settings.task_batch_size)


def _loss(task: Task, model: Finetuning, batch: Any) -> Tensor:
    return task_losses(model, batch, task).mean()
