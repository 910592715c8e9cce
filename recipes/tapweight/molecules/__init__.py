"""TapWeight on molecules: graphs from SMILES, objectives, tasks. Names are imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlopt.imports import import_lazily

if TYPE_CHECKING:
    from .data import molecule_net, read_corpus, read_table
    from .encoder import GINE
    from .objectives import OBJECTIVES, make_objective
    from .predictor import Predictor
    from .splits import random_split, scaffold_split
    from .task import MoleculeTask

__all__ = [
    "GINE",
    "OBJECTIVES",
    "MoleculeTask",
    "Predictor",
    "make_objective",
    "molecule_net",
    "random_split",
    "read_corpus",
    "read_table",
    "scaffold_split",
]

__getattr__ = import_lazily(
    __name__,
    {
        "data": ("molecule_net", "read_corpus", "read_table"),
        "encoder": ("GINE",),
        "objectives": ("OBJECTIVES", "make_objective"),
        "predictor": ("Predictor",),
        "splits": ("random_split", "scaffold_split"),
        "task": ("MoleculeTask",),
    },
)
