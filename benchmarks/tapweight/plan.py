"""The plan of a study: what is run, and everything that its scores depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import attrs

from mlopt.recipes.tapweight.settings import Settings

__all__ = ["FINETUNINGS", "PLAIN", "Cell", "Finetuning", "Labels", "Plan"]

Finetuning = Literal["probe", "full"]
FINETUNINGS: tuple[Finetuning, ...] = ("probe", "full")
#: A number of labels to draw, or all of them.
Labels = int | Literal["all"]
#: The row that uses no encoder: ridge regression on plain features of the labelled examples.
PLAIN = "plain_features"


@attrs.frozen(kw_only=True)
class Cell:
    """One row of a study: a method on a task, under a regime and a seed.

    Args:
        task: the name of the task.
        labels: the number of labelled examples for training and validation together.
        finetuning: "probe" scores a ridge head on frozen features, "full" an encoder that is finetuned as a whole.
        method: the name of the method.
        seed: the seed of the split, the encoder, the batches and the method.
    """

    task: str
    labels: Labels
    finetuning: Finetuning
    method: str
    seed: int


@attrs.frozen(kw_only=True)
class Plan:
    """A study of one modality.

    Args:
        modality: "molecules" or "text".
        tasks, methods, seeds, labels, finetunings: the rows are all combinations.
        objectives: the objectives of every method, in the order of their weights.
        passes: the encoder passes that each method may spend on adaptation.
        split: "half" holds out half of the examples for the test by seed, "usual" is the customary split.
        corpus_limit: the most unlabelled examples.
        test_limit: the most test examples.
        encoder: the size of the encoder, by the names of the modality.
        settings: the numbers of a run.
        corpus, table: the user's own files; the named tasks have files of their own when None.
        data: the folder of the named tasks.
        device: cpu or cuda.
    """

    modality: str
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    objectives: tuple[str, ...]
    seeds: tuple[int, ...]
    labels: tuple[Labels, ...]
    finetunings: tuple[Finetuning, ...] = ("probe",)
    passes: int
    split: Literal["half", "usual"] = "half"
    corpus_limit: int | None = None
    test_limit: int | None = None
    encoder: dict[str, Any]
    settings: Settings
    corpus: Path | None = None
    table: Path | None = None
    data: Path = Path("../shared/data")
    device: str = "cpu"

    @property
    def key(self) -> str:
        """A hash of what a score depends on besides its cell: rows of one key can be compared, and need no second run."""
        content = attrs.asdict(self)
        for name in ("tasks", "methods", "seeds", "labels", "finetunings", "data", "device"):
            del content[name]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]

    def cells(self, seed: int) -> Iterator[Cell]:
        """Yield the rows of a seed, method by method."""
        for method in self.methods:
            for task in self.tasks:
                for labels in self.labels:
                    # Plain features have no encoder to finetune.
                    for finetuning in ("probe",) if method == PLAIN else self.finetunings:
                        yield Cell(task=task, labels=labels, finetuning=finetuning, method=method, seed=seed)
