"""The contract of a modality of the study: its tasks, its corpora, its encoders."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from mlopt.recipes.tapweight.recipe import TapWeight
from mlopt.recipes.tapweight.task import Task

from .plan import Labels, Plan

__all__ = ["Modality"]


class Modality(ABC):
    """The data and the encoders of one modality.

    Args:
        plan: the plan of the study.
    """

    #: A phrase for the row that uses no encoder.
    plain: str

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @abstractmethod
    def corpus_of(self, task: str) -> str:
        """Return the name of the corpus of a task. Tasks of one corpus share the encoders that do not depend on labels."""

    def objectives(self, corpus: str) -> tuple[str, ...]:
        """Return the objectives that can be prepared on a corpus; by default all of the plan."""
        return self.plan.objectives

    @abstractmethod
    def task(self, name: str, seed: int, labels: Labels) -> Task:
        """Return a task whose test split, and whose labels among the rest, are drawn by the seed."""

    @abstractmethod
    def recipe(self, corpus: str, task: Task, seed: int) -> TapWeight:
        """Return the recipe of a seed: a new encoder, and the objectives on a corpus."""

    @abstractmethod
    def plain_features(self, task: Task) -> tuple[Tensor, Tensor]:
        """Return features (n, F) that need no encoder: of the training and validation examples, and of the test examples."""
