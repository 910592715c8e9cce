"""`mlopt tapweight demo`: which of six objectives suits a task, where the answer is known beforehand."""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ..recipe import Settings, TapWeight
from ..result import WAYS, TapWeightResult
from .data import Molecules, graph_of
from .encoder import GINE
from .objectives import make_objective
from .sample import recombined, solubility
from .task import MoleculeTask

__all__ = ["OBJECTIVES", "SETTINGS", "STEPS", "demonstration", "main"]

OBJECTIVES = (
    "masked_atoms",
    "contrastive",
    "functional_groups",
    "fingerprint_clusters",
    "descriptors",
    "random_labels",
)
#: The control: labels by a hash of the SMILES, from which nothing can be learned.
CONTROL = "random_labels"
STEPS = 240
SETTINGS = Settings(valid_batch_size=500, weights_lr=3e-2, epochs=15, finetune_lr=3e-3, freeze_encoder=True)
_CORPUS, _TRAIN, _VALID, _TEST = 2_000, 500, 1_000, 500

_INTRODUCTION = (
    "Molecules: fragments of about 130 well-known drugs, joined anew. Labels: solubility in water by Delaney's equation, "
    "computed by RDKit. This is a demonstration, not a benchmark: the equation is made of molecular descriptors, so that "
    "the objective that predicts those is known to suit the task, and the control (labels by hash) is known to be useless."
)


def demonstration(seed: int) -> TapWeight:
    """Return the recipe of the demonstration: which molecules are labelled, and all else that is random, by the seed."""
    smiles = recombined(_CORPUS + _TRAIN + _VALID + _TEST, 0)
    random.Random(seed).shuffle(smiles)
    corpus = _molecules(smiles[:_CORPUS], labelled=False)
    labelled = _molecules(smiles[_CORPUS:], labelled=True)
    ends = (0, _TRAIN, _TRAIN + _VALID, _TRAIN + _VALID + _TEST)
    names = ("train", "valid", "test")
    splits = {name: labelled.subset(range(*ends[k : k + 2])) for k, name in enumerate(names)}
    task = MoleculeTask(splits, label_names=labelled.label_names, kind="regression")  # type: ignore[arg-type]
    torch.manual_seed(seed)
    encoder = GINE(width=64, layers=3)
    objectives = [make_objective(name) for name in OBJECTIVES]
    return TapWeight(encoder, objectives, task, corpus, settings=SETTINGS, seed=seed)


def _molecules(smiles: Sequence[str], *, labelled: bool) -> Molecules:
    graphs = tuple(graph_of(one) for one in smiles)
    if labelled:
        for graph, one in zip(graphs, smiles, strict=True):
            graph.y = torch.tensor([[solubility(one)]])
    return Molecules(graphs, tuple(range(len(graphs))), ("solubility",) if labelled else (), (), "the demonstration")


def main(arguments: Sequence[str], *, prog: str = "mlopt tapweight demo") -> None:
    """Run the demonstration.

    Args:
        arguments: the options.
        prog: how the command was called.
    """
    parser = argparse.ArgumentParser(prog=prog, description=_INTRODUCTION)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="folder for the results (default: runs/demo)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run for each (default: 0)")
    options = parser.parse_args(arguments)
    # The batches are small: a second thread costs more than it brings.
    torch.set_num_threads(1)
    console = Console()
    console.print(_INTRODUCTION, highlight=False)
    results = {}
    for seed in options.seeds:
        result = demonstration(seed).fit(STEPS)
        result.save(options.output if len(options.seeds) == 1 else options.output / f"seed-{seed}")
        for table in result.tables():
            console.print(table)
        console.print(result.verdict, highlight=False)
        results[seed] = result
    console.print(_told(list(results.values())), highlight=False)
    if len(results) > 1:
        for table in _summary(list(results.values())):
            console.print(table)
    console.print(f"Saved in {options.output}.", highlight=False)


def _told(results: Sequence[TapWeightResult]) -> str:
    """Say what became of the control and of the objective that suits the task, and how the ways compare."""
    share, count = 1 / len(OBJECTIVES), len(results)
    below = sum(result.weights[CONTROL] < share for result in results)
    top = sum(max(result.weights, key=result.weights.__getitem__) == "descriptors" for result in results)
    better = {
        way: sum(result.scores["tapweight"]["test"] < result.scores[way]["test"] for result in results)
        for way in ("direct", "equal")
    }
    clear = sum(any(signal.significant for signal in result.signals.values()) for result in results)
    return (
        f"The control, {CONTROL}, ended below its equal share of {share:.3f} in {below} of {count} runs; descriptors, of which "
        f"the label is made, came out on top in {top} of {count}. On the test molecules TapWeight was better than equal weights "
        f"in {better['equal']} of {count}, and than direct finetuning in {better['direct']} of {count}. Within a single run some "
        f"weight was told from noise in {clear} of {count}."
    )


def _summary(results: Sequence[TapWeightResult]) -> tuple[Table, Table]:
    """Return the weights and the scores over the seeds: means, standard deviations, how often below the equal share."""
    share, count = 1 / len(OBJECTIVES), len(results)
    weights = Table(
        "objective", "weight", "below the equal share", title=f"Mean (standard deviation) over {count} seeds"
    )
    for name in OBJECTIVES:
        values = [result.weights[name] for result in results]
        weights.add_row(name, _spread(values), f"{sum(value < share for value in values)} of {count}")
    scores = Table("way", f"test {results[0].metric}")
    for way in results[0].scores:
        scores.add_row(WAYS[way], _spread([result.scores[way]["test"] for result in results]))
    return weights, scores


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f} ({statistics.stdev(values):.3f})"
