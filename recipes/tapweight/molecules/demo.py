"""`mlopt tapweight demo`: weigh six objectives for a task, with the answer known beforehand."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from ..demonstration import Known, show
from ..recipe import TapWeight
from ..settings import Settings
from .data import Molecules, graph_of
from .encoder import GINE
from .objectives import make_objective
from .sample import recombined, solubility
from .task import MoleculeTask

__all__ = ["KNOWN", "OBJECTIVES", "SETTINGS", "STEPS", "demonstration", "main"]

OBJECTIVES = (
    "masked_atoms",
    "contrastive",
    "functional_groups",
    "fingerprint_clusters",
    "descriptors",
    "random_labels",
)
#: The control: labels by a hash of the SMILES, from which nothing can be learned.
KNOWN = Known(control="random_labels", suited="descriptors", why="of which the label is made", examples="molecules")
STEPS = 240
SETTINGS = Settings(valid_batch_size=500, weights_lr=3e-2, epochs=15, finetune_lr=3e-3, freeze_encoder=True)
_CORPUS, _TRAIN, _VALID, _TEST = 2_000, 500, 1_000, 500

_INTRODUCTION = (
    "Molecules: recombined fragments of about 130 well-known drugs. Labels: solubility in water by Delaney's equation, "
    "computed by RDKit. This is a demonstration, not a benchmark: the equation is made of molecular descriptors, so "
    "the objective that predicts those is known to suit the task, and the control (labels by hash) is known to be useless."
)


def demonstration(seed: int) -> TapWeight:
    """Return the recipe of the demonstration. The seed determines the labelled molecules and everything else that is random."""
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
    graphs = tuple(map(graph_of, smiles))
    if labelled:
        for graph in graphs:
            graph.y = torch.tensor([[solubility(graph.smiles)]])
    names = ("solubility",) if labelled else ()
    return Molecules(examples=graphs, rows=tuple(range(len(graphs))), label_names=names, source="the demonstration")


def main(arguments: Sequence[str], *, prog: str = "mlopt tapweight demo") -> None:
    """Run the demonstration.

    Args:
        arguments: the options.
        prog: the name of the command.
    """
    # The batches are small: a second thread costs more than it saves.
    torch.set_num_threads(1)
    show(arguments, demonstration, KNOWN, steps=STEPS, introduction=_INTRODUCTION, output="runs/demo", prog=prog)
