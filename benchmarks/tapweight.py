"""`python -m benchmarks.tapweight`: TapWeight against direct finetuning and equal weights on real molecules, and what it costs.

For each task and seed: adapt on the corpus, finetune, choose the epoch on validation, score the scaffold split's test molecules
once. Then time of an outer step of TapWeight over that of the plain continued-pretraining steps on as many batches,
interleaved, by medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from rich.console import Console
from rich.table import Table

from mlopt.generators import seed_everything
from mlopt.recipes.tapweight.molecules.data import Molecules, read_corpus
from mlopt.recipes.tapweight.molecules.encoder import GINE
from mlopt.recipes.tapweight.molecules.objectives import make_objective
from mlopt.recipes.tapweight.molecules.task import MoleculeTask
from mlopt.recipes.tapweight.recipe import Settings, TapWeight
from mlopt.solving.engine import Engine

from .report import interleaved, write

OBJECTIVES = (
    "masked_atoms",
    "masked_bonds",
    "contrastive",
    "functional_groups",
    "fingerprint_clusters",
    "random_labels",
)
WAYS = ("direct", "equal", "tapweight")


@attrs.frozen(kw_only=True)
class Size:
    """How much is run."""

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
    """Return TapWeight on one task; the targets that objectives attach to the corpus are computed for the first run only."""
    seed_everything(seed)
    return TapWeight(
        GINE(width=size.width, layers=size.layers).to(device),
        [make_objective(name) for name in OBJECTIVES],
        MoleculeTask.from_csv(table),
        corpus,
        settings=size.settings,
        seed=seed,
    )


def cost(tapweight: TapWeight, every: int, rounds: int, device: str) -> float:
    """Return the time of an outer step with `every` pretraining steps over that of `every` plain pretraining steps."""
    tapweight.settings = attrs.evolve(tapweight.settings, every=every)
    whole, plain = tapweight.problem(1_000)[0], tapweight.equal_weights(1_000)
    engines = Engine(whole, seed=0), Engine(plain, seed=0)

    def plain_steps() -> None:
        for _ in range(every):
            engines[1].step()

    ours, theirs = interleaved([engines[0].step, plain_steps], rounds, device, warm_up=2)
    return ours / theirs


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tapweight", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="a minute: one task, one seed, few steps; the scores mean nothing"
    )
    size.add_argument("--full", action="store_true", help="hours: five tasks, five seeds, the whole corpus")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("MLOPT_DATA", "../shared/data")) / "mol")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", metavar="FILE", help="write the rows, with commit and versions")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        torch.set_num_threads(1)
    chosen = QUICK if options.quick else FULL if options.full else STANDARD
    console = Console()
    if not options.data.is_dir():
        parser.exit(
            2,
            f"no folder {options.data}: give --data a folder with zinc_50k.csv.gz and {', '.join(chosen.tasks)} as .csv\n",
        )
    corpus = read_corpus(options.data / "zinc_50k.csv.gz", limit=chosen.corpus)
    console.print(f"Corpus: {corpus.summary()}.", markup=False)
    rows: list[dict[str, Any]] = []
    for task in chosen.tasks:
        for seed in chosen.seeds:
            made = recipe(corpus, options.data / f"{task}.csv", seed, chosen, options.device)
            result = made.fit(chosen.steps)
            console.print(f"{task}, seed {seed}: {result.verdict}", markup=False)
            row = {
                "task": task,
                "metric": result.metric,
                "seed": seed,
                "scores": result.scores,
                "weights": result.weights,
            }
            rows.append(row | {"signals": {name: attrs.asdict(signal) for name, signal in result.signals.items()}})
    costs = {every: cost(made, every, 5 if options.quick else 30, options.device) for every in (1, 4)}
    for table in _tables(rows, costs):
        console.print(table)
    write(options.json, options.device, {"size": attrs.asdict(chosen), "runs": rows, "cost": costs})


def _tables(rows: Sequence[dict[str, Any]], costs: dict[int, float]) -> list[Table]:
    tasks = dict.fromkeys(row["task"] for row in rows)
    scores = Table(
        "task", "metric", *WAYS, title=f"Test scores, mean (standard deviation) over {len(rows) // len(tasks)} seeds"
    )
    weights = Table(
        "objective", *tasks, title="Learned weights, mean (standard deviation); in how many runs significant"
    )
    for task in tasks:
        own = [row for row in rows if row["task"] == task]
        scores.add_row(task, own[0]["metric"], *(_spread([row["scores"][way]["test"] for row in own]) for way in WAYS))
    for name in OBJECTIVES:
        cells = []
        for task in tasks:
            own = [row for row in rows if row["task"] == task]
            clear = sum(row["signals"][name]["significant"] for row in own)
            cells.append(f"{_spread([row['weights'][name] for row in own])}; {clear} of {len(own)}")
        weights.add_row(name, *cells)
    time = Table("lambda moves every", "time over plain pretraining", title="Cost of an iteration")
    for every, ratio in costs.items():
        time.add_row(f"{every} steps" if every > 1 else "step", f"{ratio:.2f}")
    return [scores, weights, time]


def _spread(values: Sequence[float]) -> str:
    deviation = f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


if __name__ == "__main__":
    main()
