"""`python -m benchmarks.tapweight molecules`: TapWeight against other methods on real molecules, and its cost.

For each task and seed: adapt on the corpus, finetune, choose the epoch on validation, score the test molecules of the scaffold
split once. First, the cost: time of an outer step of TapWeight relative to plain continued-pretraining steps on as many batches,
medians of interleaved runs.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import attrs
import torch

from mlopt.recipes.tapweight.molecules.data import Molecules, read_corpus
from mlopt.recipes.tapweight.molecules.encoder import GINE
from mlopt.recipes.tapweight.molecules.objectives import make_objective
from mlopt.recipes.tapweight.molecules.task import MoleculeTask
from mlopt.recipes.tapweight.recipe import TapWeight
from mlopt.recipes.tapweight.settings import Settings
from mlopt.rng import seed_everything

from .common import run

OBJECTIVES = (
    "masked_atoms",
    "masked_bonds",
    "contrastive",
    "functional_groups",
    "fingerprint_clusters",
    "random_labels",
)


@attrs.frozen(kw_only=True)
class Size:
    """The size of a run."""

    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    corpus: int
    steps: int
    width: int
    layers: int
    settings: Settings


QUICK = Size(
    tasks=("esol",), seeds=(0,), corpus=500, steps=20, width=32, layers=2, settings=Settings(epochs=3, measurements=5)
)
STANDARD = Size(
    tasks=("bbbp", "esol"),
    seeds=(0, 1, 2),
    corpus=50_000,
    steps=300,
    width=64,
    layers=3,
    settings=Settings(weights_lr=0.03, epochs=20),
)
FULL = Size(
    tasks=("bbbp", "bace", "clintox", "esol", "freesolv"),
    seeds=(0, 1, 2, 3, 4),
    corpus=50_000,
    steps=10_000,
    width=128,
    layers=4,
    settings=Settings(epochs=50, every=4),
)


def recipe(corpus: Molecules, table: Path, seed: int, size: Size, device: str) -> TapWeight:
    """Return TapWeight on one task; only the first run computes the targets that objectives attach to the corpus."""
    seed_everything(seed)
    return TapWeight(
        GINE(width=size.width, layers=size.layers).to(device),
        [make_objective(name) for name in OBJECTIVES],
        MoleculeTask.from_csv(table),
        corpus,
        settings=size.settings,
        seed=seed,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tapweight molecules", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="a minute: one task, one seed, few steps; the scores mean nothing"
    )
    size.add_argument("--full", action="store_true", help="hours: five tasks, five seeds, the whole corpus")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("MLOPT_DATA", "../shared/data")) / "mol")
    parser.add_argument(
        "--cost",
        action="store_true",
        help="measure only the cost of an iteration; other load on the machine disturbs it",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", metavar="FILE", help="write the rows, with commit and versions")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        torch.set_num_threads(1)
    chosen = QUICK if options.quick else FULL if options.full else STANDARD
    if not options.data.is_dir():
        parser.exit(
            2,
            f"no folder {options.data}: pass --data a folder with zinc_50k.csv.gz and {', '.join(chosen.tasks)} as .csv\n",
        )
    corpus = read_corpus(options.data / "zinc_50k.csv.gz", limit=chosen.corpus)
    print(f"Corpus: {corpus.summary()}.")
    run(
        lambda task, seed: recipe(corpus, options.data / f"{task}.csv", seed, chosen, options.device),
        chosen,
        rounds=5 if options.quick else 30,
        cost_only=options.cost,
        device=options.device,
        json=options.json,
    )
