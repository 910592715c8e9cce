"""Weights that are learned by two levels: the validation loss is that of the pretrained encoder itself, with a head of the task.

pretraining   theta*(lambda), omega* = argmin  sum_k lambda_k L_k(theta; unlabelled examples) + L_train(theta, omega)
reweighting   min_lambda  L_valid(theta*(lambda), omega*),      lambda = softmax(a)

omega is the head of the task. With the identity in place of the inverse Hessian, dL_valid/dlambda_k = -<grad L_k, grad L_valid>.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call

import mlopt
from mlopt.rng import derive_seed, seed_everything

from ..models import Merged, objective_losses
from ..task import evaluation
from .method import Adapted, Method
from .weights import DelayedAdam, SimplexWeights

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from ..experiment import Experiment
    from ..models import Pretraining

__all__ = ["TwoLevels"]


class _WithTask(SimplexWeights):
    """lambda, and 1 for the task's training loss: called without arguments it returns (K + 1,)."""

    def forward(self) -> Tensor:
        weights = super().forward()
        return torch.cat([weights, weights.new_ones(1)])


class _Pairs:
    """Pairs of batches, as many as the first data have; the second start again when they end."""

    def __init__(self, first: Iterable[Any], second: Iterable[Any]) -> None:
        self._first, self._second = first, second

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        # The first data draw their order before the second: so it is the order that methods without the second see.
        second = self._endless()
        for batch in self._first:
            yield batch, next(second)

    def _endless(self) -> Iterator[Any]:
        while True:
            yield from self._second


class TwoLevels(Method):
    """Learned weights, with a head of the task on the pretrained encoder.

    Attributes:
        trains_encoder: True if L_train trains the encoder; False if it trains the head alone.
    """

    trains_encoder: bool

    def passes(self, experiment: Experiment) -> int:
        """Return the passes of all objectives, of L_train and of L_valid."""
        each = experiment.views + 1
        outer, _ = experiment.settings.schedule(experiment.steps)
        # The first outer step has no cotangent of an earlier step, and evaluates the losses of pretraining once more.
        return experiment.pretraining_steps * each + outer + each

    def phases(self, experiment: Experiment) -> tuple[int, ...]:
        """Return the outer steps, each of which moves the weights."""
        return experiment.settings.schedule(experiment.steps)[:1]

    def problem(self, experiment: Experiment, model: Pretraining) -> mlopt.Problem:
        """Return the two levels, which train `model` in place."""
        settings, task, objectives = experiment.settings, experiment.task, experiment.objectives
        scales, names = experiment.scales, [f"weight/{name}" for name in experiment.names]
        task_loss = _joint_loss if self.trains_encoder else _head_loss

        def pretraining_loss(own: Merged, batch: tuple[Any, Any], *, reweighting: _WithTask) -> mlopt.Mixture:
            unlabelled, labelled = batch
            losses = objective_losses(own.model, unlabelled, objectives, scales)
            return mlopt.Mixture({**losses, "task loss": partial(task_loss, own, labelled)}, weights="reweighting")

        def reweighting_loss(own: _WithTask, batch: Any, *, pretraining: Merged) -> dict[str, Any]:
            with evaluation(pretraining):
                loss = pretraining(batch).mean()
            return {"loss": loss, **dict(zip(names, own().detach()[:-1], strict=True))}

        # The task's head is drawn here, from the seed of the experiment, whatever was drawn before.
        seed_everything(derive_seed(experiment.seed, "finetuning"))
        _, delay = settings.schedule(experiment.steps)
        return mlopt.Problem(
            mlopt.Level(
                "reweighting",
                _WithTask(len(objectives)).to(experiment.device),
                reweighting_loss,
                data=task.loader("valid", settings.valid_batch_size, shuffle=True),
                optimizer=partial(DelayedAdam, lr=settings.weights_lr, delay=delay),
                precision=settings.autocast,
            ),
            mlopt.Level(
                "pretraining",
                Merged(model, task).to(experiment.device),
                pretraining_loss,
                data=_Pairs(experiment.batches(), task.loader("train", settings.task_batch_size, shuffle=True)),
                optimizer=settings.adam(settings.pretraining_lr),
                scheduler=settings.scheduler(experiment.pretraining_steps),
                precision=settings.autocast,
                steps=settings.every,
                estimator=mlopt.Identity(streamed=True),
            ),
        )

    def adapt(self, experiment: Experiment, callbacks: Sequence[mlopt.Callback] = ()) -> Adapted:
        """Pretrain the encoder further and learn the weights."""
        model = experiment.model()
        problem = self.problem(experiment, model)
        outer, _ = experiment.settings.schedule(experiment.steps)
        solution = experiment.solve(self.name, problem, outer, callbacks=callbacks)
        weights = problem["reweighting"].module()[:-1].tolist()
        return Adapted(
            encoder=model.encoder,
            weights=dict(zip(experiment.names, weights, strict=True)),
            history=solution.history,
        )


def _joint_loss(own: Merged, batch: Any) -> Tensor:
    """Return the task's loss, as a function of the encoder and the head."""
    losses: Tensor = own(batch)
    return losses.mean()


def _head_loss(own: Merged, batch: Any) -> Tensor:
    """Return the task's loss as a function of the head alone, on the features that the validation loss sees."""
    fixed = {name: p.detach() for name, p in own.named_parameters() if name.startswith("model.encoder.")}
    with evaluation(own.model.encoder):
        losses: Tensor = functional_call(own, fixed, (batch,))
    return losses.mean()
