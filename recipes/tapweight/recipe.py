"""TapWeight: a task, objectives and an encoder; the objectives' weights are learned from the task's validation loss."""

from __future__ import annotations

import copy
import statistics
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR
from torch.utils.data import DataLoader

import mlopt
from mlopt.errors import ArgumentError
from mlopt.problem import Stream
from mlopt.rng import derive_seed, seed_everything
from mlopt.validation import at_least, one_of, positive

from .levels import Pretraining, three_levels
from .result import TapWeightResult
from .signals import SignalMeter
from .training import Saved, Score, finetune, fixed_weights, gradient_norms
from .weights import DelayedAdam

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from torch import nn

    from .objective import Objective
    from .task import Task

__all__ = ["Settings", "TapWeight"]

Method = Literal["direct", "equal", "tapweight"]


@attrs.frozen(kw_only=True)
class Settings:
    """The numbers of a TapWeight run.

    Args:
        gamma: strength of the coupling gamma ||omega - theta||^2 of the finetuned encoder to the pretrained one. Small values let
            finetuning overfit its training labels, and the validation gradient then says little of the pretrained encoder.
        every: pretraining steps for each step on the weights.
        batch_size: unlabelled examples in a batch.
        task_batch_size: labelled training examples in a batch.
        valid_batch_size: validation examples in a batch for the weights; all of them where there are no more.
        pretraining_lr: learning rate of AdamW on the encoder and the objectives' heads.
        finetuning_lr: learning rate of AdamW on the finetuning level.
        weight_decay: share of the variables that AdamW takes off them at each step, times the learning rate, on both.
        lr_schedule: what becomes of the learning rates of both over the run: they stay, or fall to zero on a line or a cosine.
        precision: "bf16" or "fp16" evaluates the losses under autocast, "none" as they are.
        warmup: share of the steps, from 0 up to 1, during which the weights stay equal while the heads learn to use the features.
        weights_lr: learning rate of Adam on the logits of the weights; Adam's step has no scale, so neither has this.
        scale: "gradient" divides each objective's loss by the norm of its gradient on the encoder at the start, so that
            equal weights mean equal pull; "none" takes the losses as they are, as the authors' release does.
        epochs: passes over the training labels in the final finetuning.
        finetune_lr: learning rate of Adam in the final finetuning.
        freeze_encoder: whether the final finetuning trains the head only.
        finetunings: final finetunings, each with its own seed; scores are their means.
        measurements: how often the signals of the objectives are measured on two halves of the validation labels.
    """

    gamma: float = attrs.field(default=100.0, validator=positive)
    every: int = attrs.field(default=1, validator=at_least(1))
    batch_size: int = attrs.field(default=64, validator=at_least(2))
    task_batch_size: int = attrs.field(default=64, validator=at_least(1))
    valid_batch_size: int = attrs.field(default=128, validator=at_least(1))
    pretraining_lr: float = attrs.field(default=1e-3, validator=at_least(0.0))
    finetuning_lr: float = attrs.field(default=1e-3, validator=at_least(0.0))
    weight_decay: float = attrs.field(default=0.0, validator=at_least(0.0))
    lr_schedule: str = attrs.field(default="constant", validator=one_of("constant", "linear", "cosine"))
    precision: str = attrs.field(default="none", validator=one_of("none", "bf16", "fp16"))
    warmup: float = attrs.field(default=0.3, validator=attrs.validators.and_(at_least(0.0), attrs.validators.lt(1.0)))
    weights_lr: float = attrs.field(default=1e-2, validator=at_least(0.0))
    scale: str = attrs.field(default="gradient", validator=one_of("gradient", "none"))
    epochs: int = attrs.field(default=30, validator=at_least(1))
    finetune_lr: float = attrs.field(default=1e-3, validator=at_least(0.0))
    freeze_encoder: bool = False
    finetunings: int = attrs.field(default=1, validator=at_least(1))
    measurements: int = attrs.field(default=20, validator=at_least(2))

    def schedule(self, steps: int) -> tuple[int, int]:
        """Return how many outer steps a run takes, and during how many of them the weights wait.

        Raises:
            ValueError: the weights move too few times to be judged.
        """
        outer = steps // self.every
        delay = int(self.warmup * outer)
        if outer - delay < self.measurements:
            raise ArgumentError(
                f"steps={steps} at every={self.every} and warmup={self.warmup} moves the weights {outer - delay} times; at least "
                f"measurements={self.measurements} are needed to judge them: take more steps"
            )
        return outer, delay

    @property
    def autocast(self) -> str | None:
        """The precision of the levels' steps, as `mlopt.Level` has it."""
        return None if self.precision == "none" else self.precision

    def scheduler(self, steps: int) -> Callable[..., Any] | None:
        """Return what makes the scheduler of an optimiser that takes so many steps."""
        if self.lr_schedule == "constant":
            return None
        if self.lr_schedule == "linear":
            return partial(LinearLR, start_factor=1.0, end_factor=0.0, total_iters=steps)
        return partial(CosineAnnealingLR, T_max=steps)


class TapWeight:
    """Task-adaptive pretraining that learns the weights of its objectives.

    Three levels: pretraining, theta*(lambda) = argmin sum_k lambda_k L_k(theta); finetuning,
    omega*(theta*) = argmin L_train(omega) + gamma ||omega - theta*||^2; reweighting, min_lambda L_valid(omega*(theta*(lambda))).
    The adapted encoder is theta; it is then finetuned anew, and scored once.

    Args:
        encoder: an `nn.Module` with `width`, the number of its features; left as it is.
        objectives: at least two, each with a name of its own.
        task: the downstream task.
        corpus: unlabelled examples.
        settings: the numbers of the run.
        collate: joins unlabelled examples into a batch; the task's when None.
        estimator: how cotangents are pulled back through the finetuning level. The identity needs no network pass; an estimator
            that solves with the level's Hessian, such as `mlopt.ConjugateGradient(iterations=5)`, is closer to the truth.
        seed: of everything random.

    Raises:
        ValueError: fewer than two objectives, or two of one name; a corpus, or a split of the task, of fewer than two examples.

    Example:
        >>> from mlopt.recipes import TapWeight
        >>> result = TapWeight(encoder, objectives, task, corpus).fit(steps=2_000)
        >>> result.weights, result.scores, result.verdict

    Source: Zhang, Somayajula & Xie, TMLR 2025 (arXiv 2410.10006).
    """

    def __init__(
        self,
        encoder: nn.Module,
        objectives: Sequence[Objective],
        task: Task,
        corpus: Sequence[Any],
        *,
        settings: Settings | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        estimator: mlopt.Estimator | None = None,
        seed: int = 0,
    ) -> None:
        names = [objective.name for objective in objectives]
        if len(names) < 2:
            raise ArgumentError(f"TapWeight: {len(names)} objectives; there is something to weigh from two on")
        if len(set(names)) < len(names):
            raise ArgumentError(
                f"TapWeight: two objectives of one name among {', '.join(names)}; give each its own `name`"
            )
        if len(corpus) < 2:
            raise ArgumentError(f"TapWeight: a corpus of {len(corpus)} examples; it needs at least two")
        for split, examples in task.splits.items():
            if len(examples) < 2:
                raise ArgumentError(
                    f"TapWeight: the {split} split holds {len(examples)} examples; it needs at least two"
                )
        self.encoder, self.objectives, self.task, self.corpus = encoder, tuple(objectives), task, corpus
        self.settings = settings or Settings()
        self.estimator = estimator or mlopt.Identity()
        self.seed = seed
        self._collate = collate or task.collate
        self._prepared: tuple[Pretraining, dict[str, float]] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The objectives' names, in the order of their weights."""
        return tuple(objective.name for objective in self.objectives)

    def fit(
        self,
        steps: int,
        *,
        baselines: Sequence[str] = ("direct", "equal"),
        callbacks: Sequence[mlopt.Callback] = (),
        checkpoint: mlopt.Checkpoints | str | os.PathLike[str] | None = None,
        resume: bool = False,
        progress: bool = True,
    ) -> TapWeightResult:
        """Adapt the encoder, learn the weights, finetune, score; and the same for the baselines, with the same budget.

        Args:
            steps: pretraining steps.
            baselines: any of "direct" (finetuning without adaptation) and "equal" (the same pretraining steps on the same
                batches at equal weights).
            callbacks: see `mlopt.Callback`; called during the adaptation.
            checkpoint: a folder in which each phase of the run is saved, in a folder of its own, or
                `mlopt.Checkpoints(folder, every=...)`.
            resume: whether to go on from there: phases that had ended are read, the others go on from their newest checkpoint.
            progress: whether to show progress bars.

        Returns:
            The weights and what they are worth, the history, the adapted encoder, the scores.

        Raises:
            ValueError: too few steps, an unknown baseline, an objective that gives the encoder no gradient.
        """
        unknown = [name for name in baselines if name not in ("direct", "equal")]
        if unknown:
            raise ArgumentError(f"fit: unknown baseline {unknown[0]!r}; there are 'direct' and 'equal'")
        outer, _ = self.settings.schedule(steps)
        problem, meter = self.problem(steps)
        solve = Saved(checkpoint, resume=resume, progress=progress)
        solution = solve("adaptation", problem, outer, callbacks=[meter, *callbacks], seed=self.seed)
        adapted = problem["pretraining"].module.encoder
        encoders = self._baselines(baselines, outer * self.settings.every, solve) | {"tapweight": adapted}
        scores = {way: self._finetune(encoder, way, solve) for way, encoder in encoders.items()}
        weights = problem["reweighting"].module().tolist()
        return TapWeightResult(
            weights=dict(zip(self.names, weights, strict=True)),
            signals=meter.signals(),
            history=solution.history,
            encoder=adapted,
            scores={name: _mean(values) for name, values in scores.items()},
            metric=self.task.metric_name,
            greater_is_better=self.task.greater_is_better,
            settings=attrs.asdict(self.settings),
            steps=steps,
            seed=self.seed,
            estimator=str(self.estimator),
            data={"task": repr(self.task), "corpus": _described(self.corpus)},
        )

    def _baselines(self, names: Sequence[str], steps: int, solve: Saved) -> dict[str, nn.Module]:
        """Return the encoder of each baseline: the one at the start, and that of pretraining at equal weights."""
        encoders = {"direct": self.encoder} if "direct" in names else {}
        if "equal" in names:
            equal = self.equal_weights(steps)
            solve("equal", equal, steps, seed=self.seed)
            encoders["equal"] = equal["pretraining"].module.encoder
        return encoders

    def prepare(self) -> tuple[Pretraining, dict[str, float]]:
        """Prepare the objectives on the corpus; return the model at its start, and what each loss is divided by."""
        if self._prepared is None:
            for objective in self.objectives:
                objective.prepare(self.corpus, self.seed)
            seed_everything(self.seed)
            model = Pretraining(copy.deepcopy(self.encoder), self.objectives).to(next(self.encoder.parameters()).device)
            model.train()
            stream = self._stream("prepare")
            norms = gradient_norms(model, self.objectives, [stream.next() for _ in range(4)], self.seed)
            scales = norms if self.settings.scale == "gradient" else dict.fromkeys(norms, 1.0)
            self._prepared = model, scales
        return self._prepared

    def problem(self, steps: int) -> tuple[mlopt.Problem, SignalMeter]:
        """Return the three levels, and the meter that measures the objectives' signals, for a run of so many steps."""
        settings, task = self.settings, self.task
        start, scales = self.prepare()
        outer, delay = settings.schedule(steps)
        # The task's head is drawn here: from the recipe's seed, whatever was drawn before.
        seed_everything(derive_seed(self.seed, "finetuning"))
        problem = three_levels(
            copy.deepcopy(start),
            self.objectives,
            task,
            scales=scales,
            gamma=settings.gamma,
            corpus=self.batches(),
            train=task.loader("train", settings.task_batch_size, shuffle=True),
            valid=task.loader("valid", settings.valid_batch_size, shuffle=True),
            optimizers={
                "pretraining": self._adam(settings.pretraining_lr),
                "finetuning": self._adam(settings.finetuning_lr),
                "reweighting": partial(DelayedAdam, lr=settings.weights_lr, delay=delay),
            },
            schedulers={
                "pretraining": settings.scheduler(outer * settings.every),
                "finetuning": settings.scheduler(outer),
            },
            every=settings.every,
            precision=settings.autocast,
            estimator=self.estimator,
        )
        train = Stream("train", task.loader("train", settings.task_batch_size, shuffle=True), self.seed, self._device)
        corpus = self._stream("measure")
        meter = SignalMeter(
            self.names,
            task.splits["valid"],
            task.collate,
            {"pretraining": corpus, "finetuning": train},
            start=delay,
            interval=max(1, (outer - delay) // settings.measurements),
            limit=1_000,
            batch_size=settings.valid_batch_size,
            seed=derive_seed(self.seed, "halves"),
        )
        return problem, meter

    def equal_weights(self, steps: int) -> mlopt.Problem:
        """Return so many steps of pretraining at equal weights, from the same start and on the same batches, as a problem."""
        start, scales = self.prepare()
        return fixed_weights(
            copy.deepcopy(start),
            self.objectives,
            self.batches(),
            weights=dict.fromkeys(self.names, 1 / len(self.names)),
            scales=scales,
            optimizer=self._adam(self.settings.pretraining_lr),
            scheduler=self.settings.scheduler(steps),
            precision=self.settings.autocast,
        )

    def _adam(self, lr: float) -> Callable[..., AdamW]:
        return partial(AdamW, lr=lr, weight_decay=self.settings.weight_decay, fused=True)

    def batches(self) -> DataLoader[Any]:
        """Return batches of the corpus."""
        size = min(self.settings.batch_size, len(self.corpus))
        corpus: Any = self.corpus
        return DataLoader(corpus, batch_size=size, shuffle=True, drop_last=True, collate_fn=self._collate)

    @property
    def _device(self) -> torch.device:
        return next(self.encoder.parameters()).device

    def _stream(self, purpose: str) -> Stream:
        return Stream(purpose, self.batches(), self.seed, self._device)

    def _finetune(self, encoder: nn.Module, way: str, solve: Saved) -> list[Score]:
        settings = self.settings
        return [
            finetune(
                encoder,
                self.task,
                epochs=settings.epochs,
                learning_rate=settings.finetune_lr,
                batch_size=settings.task_batch_size,
                freeze_encoder=settings.freeze_encoder,
                precision=settings.autocast,
                seed=derive_seed(self.seed, "finetune", k),
                solve=partial(solve, f"finetuning-{way}-{k}"),
            )
            for k in range(settings.finetunings)
        ]


def _mean(scores: Sequence[Score]) -> dict[str, float]:
    """Return the mean valid and test scores of several finetunings."""
    return {split: statistics.fmean(getattr(score, split) for score in scores) for split in ("valid", "test")}


def _described(corpus: Sequence[Any]) -> str:
    """Return what a corpus says of itself, else its size."""
    return str(corpus.summary()) if hasattr(corpus, "summary") else f"{len(corpus)} examples"
