"""The numbers of a run, and the optimisers and schedules that follow from them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import attrs
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from mlopt.errors import ArgumentError
from mlopt.validation import at_least, one_of, positive, share

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Settings"]

# Literals, so that the command line lists the choices.
LrSchedule = Literal["constant", "linear", "cosine"]
Precision = Literal["none", "bf16", "fp16"]
Scale = Literal["gradient", "none"]


@attrs.frozen(kw_only=True)
class Settings:
    """The numbers of a TapWeight run.

    Args:
        gamma: strength of the coupling gamma ||omega - theta||^2 of the finetuned encoder to the pretrained one. Small values let
            finetuning overfit its training labels, and the validation gradient then says little about the pretrained encoder.
        every: pretraining steps for each step on the weights.
        batch_size: unlabelled examples in a batch.
        task_batch_size: labelled training examples in a batch.
        valid_batch_size: validation examples in a batch for the weights; all of them if there are fewer.
        pretraining_lr: learning rate of AdamW on the encoder and the objectives' heads.
        finetuning_lr: learning rate of AdamW on the finetuning level.
        weight_decay: weight decay of AdamW on both: each step subtracts this share of the variables, times the learning rate.
        lr_schedule: schedule of both learning rates: constant, or a linear or cosine decay to zero over the run.
        precision: "bf16" or "fp16" evaluates the losses under autocast, "none" without it.
        warmup: share of the steps, from 0 up to 1, during which the weights stay equal while the heads learn to use the features.
        weights_lr: learning rate of Adam on the logits of the weights; like Adam's step, it does not depend on their scale.
        scale: "gradient" divides each objective's loss by the norm of its gradient on the encoder at the start, so that
            equal weights mean equal pull; "none" does not scale the losses, as in the authors' release.
        rehearsal_steps: steps on each objective alone before the weights are chosen by rehearsal; at most those of the main run.
        rehearsals: rehearsals of each objective, each with batches and heads of its own; their losses are averaged.
        epochs: passes over the training labels in the final finetuning.
        finetune_lr: learning rate of Adam in the final finetuning.
        freeze_encoder: train only the head in the final finetuning.
        finetunings: final finetunings, each with its own seed; scores are their means.
        ensemble: finetuned models of the predictor, each with its own seed, on the encoder of the main method.
        patience: epochs without a better validation score after which a final finetuning stops; 0 takes all epochs.
        measurements: the largest number of measurements of the objectives' signals on two halves of the validation labels.
    """

    gamma: float = attrs.field(default=100.0, validator=positive)
    every: int = attrs.field(default=1, validator=at_least(1))
    batch_size: int = attrs.field(default=64, validator=at_least(2))
    task_batch_size: int = attrs.field(default=64, validator=at_least(1))
    valid_batch_size: int = attrs.field(default=128, validator=at_least(1))
    pretraining_lr: float = attrs.field(default=1e-3, validator=at_least(0.0))
    finetuning_lr: float = attrs.field(default=1e-3, validator=at_least(0.0))
    weight_decay: float = attrs.field(default=0.0, validator=at_least(0.0))
    lr_schedule: LrSchedule = attrs.field(default="constant", validator=one_of(*get_args(LrSchedule)))
    precision: Precision = attrs.field(default="none", validator=one_of(*get_args(Precision)))
    warmup: float = attrs.field(default=0.3, validator=share)
    weights_lr: float = attrs.field(default=1e-2, validator=at_least(0.0))
    scale: Scale = attrs.field(default="gradient", validator=one_of(*get_args(Scale)))
    rehearsal_steps: int = attrs.field(default=100, validator=at_least(1))
    rehearsals: int = attrs.field(default=2, validator=at_least(1))
    epochs: int = attrs.field(default=30, validator=at_least(1))
    finetune_lr: float = attrs.field(default=1e-3, validator=at_least(0.0))
    freeze_encoder: bool = False
    finetunings: int = attrs.field(default=1, validator=at_least(1))
    ensemble: int = attrs.field(default=1, validator=at_least(1))
    patience: int = attrs.field(default=0, validator=at_least(0))
    measurements: int = attrs.field(default=20, validator=at_least(2))

    def schedule(self, steps: int) -> tuple[int, int]:
        """Return the number of outer steps of a run, and of those during which the weights wait.

        Raises:
            ValueError: there is not one outer step.
        """
        outer = steps // self.every
        if not outer:
            raise ArgumentError(
                f"steps={steps} at every={self.every}: the weights never move; take at least {self.every} steps"
            )
        return outer, int(self.warmup * outer)

    @property
    def autocast(self) -> str | None:
        """The precision of the levels' steps, as `mlopt.Level` takes it."""
        return None if self.precision == "none" else self.precision

    def adam(self, lr: float) -> Callable[..., AdamW]:
        """Return the factory of the optimisers of pretraining and finetuning."""
        return partial(AdamW, lr=lr, weight_decay=self.weight_decay, fused=True)

    def scheduler(self, steps: int) -> Callable[..., Any] | None:
        """Return the factory of the scheduler of an optimiser that takes `steps` steps; None for a constant rate."""
        if self.lr_schedule == "constant":
            return None
        if self.lr_schedule == "linear":
            return partial(LinearLR, start_factor=1.0, end_factor=0.0, total_iters=steps)
        return partial(CosineAnnealingLR, T_max=steps)
