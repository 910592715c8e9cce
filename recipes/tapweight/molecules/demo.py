"""`mlopt tapweight demo`: weigh eight objectives for measured solubilities of real molecules."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from importlib import resources

import torch

from ..demonstration import Known, show
from ..recipe import TapWeight
from ..settings import Settings
from .data import Molecules
from .encoder import GINE
from .graphs import graph_of
from .objectives import make_objective
from .sample import recombined
from .task import MoleculeTask

__all__ = ["KNOWN", "OBJECTIVES", "SETTINGS", "STEPS", "demonstration", "main"]

OBJECTIVES = (
    "masked_atoms",
    "contrastive",
    "functional_groups",
    "fingerprint_clusters",
    "size",
    "polarity",
    "topology",
    "random_labels",
)
#: The control: labels by a hash of the SMILES, from which nothing can be learned.
KNOWN = Known(
    control="random_labels",
    suited="polarity",
    why="which includes logP, the main term of Delaney's equation for the solubility",
    examples="molecules",
)
STEPS = 600
SETTINGS = Settings(epochs=60, task_batch_size=32, finetune_lr=3e-3, freeze_encoder=True)
_CORPUS, _TRAIN, _VALID = 2_000, 160, 40

_INTRODUCTION = (
    "Corpus: 2,000 recombined fragments of about 130 well-known drugs. Labels: the measured solubility in water of 200 molecules "
    "of ESOL (Delaney 2004); the other 928 are the test split. One objective, the control, has labels by hash and is useless."
)


def demonstration(seed: int) -> TapWeight:
    """Return the recipe of the demonstration. The seed determines the labelled molecules and everything else that is random."""
    corpus = _molecules([(smiles, None) for smiles in recombined(_CORPUS, 0)], "recombined drugs")
    labelled = solubilities()
    random.Random(seed).shuffle(labelled)
    ends = (0, _TRAIN, _TRAIN + _VALID, len(labelled))
    splits = {
        name: _molecules(labelled[slice(*ends[k : k + 2])], "ESOL") for k, name in enumerate(("train", "valid", "test"))
    }
    task = MoleculeTask(splits, label_names=splits["train"].label_names, kind="regression")  # type: ignore[arg-type]
    torch.manual_seed(seed)
    encoder = GINE(width=64, layers=3)
    objectives = [make_objective(name) for name in OBJECTIVES]
    return TapWeight(encoder, objectives, task, corpus, settings=SETTINGS, seed=seed)


def solubilities() -> list[tuple[str, float]]:
    """Return the SMILES of 1,128 molecules and the measured log10 of their solubility in water (mol/l).

    Source: Delaney, "ESOL: estimating aqueous solubility directly from molecular structure", J. Chem. Inf. Comput. Sci. 2004,
    as collected by MoleculeNet (Wu et al. 2018). The file comes from a repository under the MIT licence.
    """
    text = (resources.files(__package__) / "esol.csv").read_text(encoding="utf-8")
    _, *rows = csv.reader(text.splitlines())
    return [(smiles, float(label)) for smiles, label in rows]


def _molecules(rows: Sequence[tuple[str, float | None]], source: str) -> Molecules:
    """Return molecules, with their labels if they have any."""
    graphs = tuple(graph_of(smiles) for smiles, _ in rows)
    labelled = rows[0][1] is not None
    if labelled:
        for graph, (_, label) in zip(graphs, rows, strict=True):
            graph.y = torch.tensor([[label]])
    names = ("solubility",) if labelled else ()
    return Molecules(examples=graphs, rows=tuple(range(len(graphs))), label_names=names, source=source)


def main(arguments: Sequence[str], *, prog: str = "mlopt tapweight demo") -> None:
    """Run the demonstration.

    Args:
        arguments: the options.
        prog: the name of the command.
    """
    # The batches are small: a second thread costs more than it saves.
    torch.set_num_threads(1)
    show(arguments, demonstration, KNOWN, steps=STEPS, introduction=_INTRODUCTION, output="runs/demo", prog=prog)
