"""Plain training in the recipe: pretraining with fixed weights, and finetuning with the choice made on validation."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import torch

import mlopt
from mlopt.errors import ArgumentError
from mlopt.rng import preserved, seed_everything

from .levels import Finetuning, Pretraining, objective_losses, task_loss

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor, nn

    from .objective import Objective
    from .task import Task

__all__ = ["Saved", "Score", "finetune", "fixed_weights", "gradient_norms"]


class Saved:
    """`mlopt.solve` for the phases of a recipe, each of which is saved in a folder of its own, where any is.

    A phase that had ended before a resume is read from its last checkpoint.

    Args:
        checkpoint: the folder of all phases, or how to save in it; nothing is saved when None.
        resume: whether phases go on from their newest checkpoints.
        progress: whether to show progress bars.
    """

    def __init__(
        self, checkpoint: mlopt.Checkpoints | str | os.PathLike[str] | None, *, resume: bool, progress: bool
    ) -> None:
        if resume and checkpoint is None:
            raise ArgumentError("resume=True without checkpoint; give the folder that the run was saved in")
        known = checkpoint is None or isinstance(checkpoint, mlopt.Checkpoints)
        self._checkpoints: Any = checkpoint if known else mlopt.Checkpoints(checkpoint)  # type: ignore[arg-type]
        self._options = {"resume": resume, "progress": progress}

    def __call__(self, phase: str, problem: mlopt.Problem, steps: int, **options: Any) -> mlopt.Solution:
        """Solve the problem of a phase."""
        own = self._checkpoints and attrs.evolve(self._checkpoints, folder=self._checkpoints.folder / phase)
        return mlopt.solve(problem, steps, checkpoint=own, **self._options, **options)


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


def gradient_norms(
    model: Pretraining, objectives: Sequence[Objective], batches: Sequence[Any], seed: int
) -> dict[str, float]:
    """Return the root mean square over batches of ||grad L_k|| on the encoder, for each objective.

    Raises:
        ValueError: an objective gives the encoder no gradient, or one that is not finite.
    """
    perturbed = copy.deepcopy(model)
    parameters = [p for p in perturbed.encoder.parameters() if p.requires_grad]
    norms = {}
    with preserved():
        seed_everything(seed)
        for objective in objectives:
            name, squares = objective.name, []
            for batch in batches:
                loss = objective_losses(perturbed, batch, [objective], {name: 1.0})[name]()
                if not loss.requires_grad:
                    raise ArgumentError(
                        f"objective {name!r}: its loss has no gradient (was it detached?); mend it or leave it out"
                    )
                gradient = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
                squares.append(sum(float(g.square().sum()) for g in gradient))
            norm = math.sqrt(sum(squares) / len(squares))
            if norm == 0.0:
                raise ArgumentError(
                    f"objective {name!r} gives the encoder no gradient, so its weight would mean nothing; does its loss use the "
                    "encoder? mend it or leave it out"
                )
            if not math.isfinite(norm):
                raise ArgumentError(f"objective {name!r}: the gradient of its loss is not finite on the first batches")
            norms[name] = norm
    return norms


def fixed_weights(
    model: Pretraining,
    objectives: Sequence[Objective],
    corpus: Iterable[Any],
    *,
    weights: Mapping[str, float],
    scales: Mapping[str, float],
    optimizer: Any,
    scheduler: Any,
    precision: str | None,
) -> mlopt.Problem:
    """Return plain continued pretraining as a problem of one level: min sum_k w_k L_k over the model, trained in place."""

    def loss(own: Pretraining, batch: Any) -> dict[str, Any]:
        losses = {name: value() for name, value in objective_losses(own, batch, objectives, scales).items()}
        total: Tensor = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
        return {"loss": total, **{name: value.detach() for name, value in losses.items()}}

    options = {"optimizer": optimizer, "scheduler": scheduler, "precision": precision}
    return mlopt.Problem(mlopt.Level("pretraining", model, loss, data=corpus, **options))


class _BestEpoch(mlopt.Callback):
    """Scores the validation split after each epoch, and keeps the variables of the best one."""

    def __init__(self, model: Finetuning, task: Task, interval: int) -> None:
        self._model, self._task, self._interval = model, task, interval
        self.valid, self.epoch, self._state = math.nan, 0, {}  # type: ignore[var-annotated]

    def on_step_end(self, run: Any) -> None:
        if run.step % self._interval:
            return
        valid = self._task.score(self._model.encoder, self._model.head, "valid")
        better = valid > self.valid if self._task.greater_is_better else valid < self.valid
        if math.isnan(self.valid) or better:
            self.valid, self.epoch = valid, run.step // self._interval
            self._state = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        return {"valid": self.valid, "epoch": self.epoch, "state": self._state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.valid, self.epoch, self._state = state["valid"], state["epoch"], dict(state["state"])

    def restore(self) -> None:
        """Load the variables of the best epoch."""
        self._model.load_state_dict(self._state)


def finetune(
    encoder: nn.Module,
    task: Task,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    freeze_encoder: bool,
    precision: str | None = None,
    seed: int,
    solve: Callable[..., Any],
) -> Score:
    """Finetune a copy of the encoder on the task, choose the epoch by the validation split, score the test split once.

    Args:
        encoder: left as it is.
        task: the task.
        epochs: passes over the training split.
        learning_rate: of Adam.
        batch_size: examples in a batch.
        freeze_encoder: whether only the head is trained.
        precision: of the steps, see `mlopt.Level`.
        seed: of the head and the order of batches.
        solve: what solves the problem: `mlopt.solve`, or a phase of `Saved`.
    """
    seed_everything(seed)
    model = Finetuning(encoder, task).to(next(encoder.parameters()).device)
    # Whatever mode the encoder came in: every way of pretraining is finetuned alike.
    model.train()
    if freeze_encoder:
        model.encoder.requires_grad_(False).eval()
    train = task.loader("train", batch_size, shuffle=True)
    interval = max(1, len(task.splits["train"]) // batch_size)
    level = mlopt.Level(
        "finetuning",
        model,
        partial(_finetuning_loss, task),
        data=train,
        optimizer=partial(torch.optim.Adam, lr=learning_rate),
        precision=precision,
    )
    best = _BestEpoch(model, task, interval)
    solve(mlopt.Problem(level), epochs * interval, callbacks=[best], seed=seed)
    best.restore()
    return Score(valid=best.valid, test=task.score(model.encoder, model.head, "test"), epoch=best.epoch)


def _finetuning_loss(task: Task, model: Finetuning, batch: Any) -> Tensor:
    return task_loss(model, batch, task)
