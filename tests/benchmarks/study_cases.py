"""A study of a few small molecules, and rows as a study writes them."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.tapweight.plan import Plan
from mlopt.recipes.tapweight.settings import Settings

CORES = ("c1ccccc1", "C1CCCCC1", "c1ccncc1", "c1ccoc1", "C1CCNCC1", "C1CCOC1", "c1ccsc1", "C1CC1")
SMILES = [f"{'C' * length}{core}{end}" for length, core, end in product((1, 2, 3), CORES, ("", "O", "N"))]


def plan(folder: Path, **changes: Any) -> Plan:
    """Write the files of two tasks into a folder, and return a plan that runs in seconds."""
    (folder / "mol").mkdir(parents=True, exist_ok=True)
    labels = {"esol": [float(len(text)) for text in SMILES], "bbbp": [float("N" in text) for text in SMILES]}
    for name, values in labels.items():
        with (folder / "mol" / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("smiles", name), *zip(SMILES, values, strict=True)])
    options: dict[str, Any] = {
        "modality": "molecules",
        "tasks": ("esol", "bbbp"),
        "methods": ("direct", "equal", "single:masked_atoms", "tapweight"),
        "objectives": ("masked_atoms", "random_labels"),
        "seeds": (0, 1),
        "labels": (20,),
        "passes": 30,
        "encoder": {"width": 8, "layers": 1},
        "settings": Settings(batch_size=8, epochs=1, measurements=2),
        "corpus": folder / "mol" / "esol.csv",
        "data": folder,
    }
    return Plan(**{**options, **changes})


def row(method: str, task: str, seed: int, score: float, **more: Any) -> dict[str, Any]:
    """Return a row; a larger score is better on every task but "esol"."""
    return {
        "key": "abc123abc123",
        "task": task,
        "labels": 200,
        "finetuning": "probe",
        "method": method,
        "seed": seed,
        "modality": "molecules",
        "split": "half",
        "title": method.upper(),
        "metric": "rmse" if task == "esol" else "roc_auc",
        "greater_is_better": task != "esol",
        "score": score,
        "steps": 10,
        "passes": 70,
        "seconds": 1.5,
        "memory": None,
        "weights": None,
        "weight_errors": None,
        "significant": {},
        "judged": False,
        "objectives": ["useful", "random_labels"],
        "control": "random_labels",
        "budget": 8_000,
        "environment": {"device": "cpu"},
        **more,
    }


def weighed(useful: float) -> Mapping[str, float]:
    """Return the weights of the two objectives of `row`."""
    return {"useful": useful, "random_labels": 1 - useful}
