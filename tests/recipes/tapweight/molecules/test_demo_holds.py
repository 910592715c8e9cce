"""The demonstration shows more than rounding, kernels and the seed change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlopt.recipes.tapweight.molecules.demo import KNOWN

SEEDS = (0, 1, 2, 3, 4)


def runs(folder: Path, capability: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the weights and the scores that the demonstration writes for each seed, on one thread with some kernels."""
    # The clusters of a run under other kernels are not read from a cache.
    settings = {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1", "MLOPT_CACHE": "none"}
    command = [sys.executable, "-m", "mlopt", "tapweight", "demo", "--output", str(folder)]
    subprocess.run([*command, "--seeds", *map(str, SEEDS)], env=os.environ | settings, check=True, capture_output=True)
    return [
        tuple(json.loads((folder / f"seed-{seed}" / name).read_text()) for name in ("weights.json", "scores.json"))  # type: ignore[misc]
        for seed in SEEDS
    ]


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_the_effect_is_larger_than_rounding_and_the_seed(capability: str, tmp_path: Path) -> None:
    """In each run: a better score than equal weights, a significant gain of the suited objective, and none of the control."""
    for weights, scores in runs(tmp_path, capability):
        test = {name: outcome["test"] for name, outcome in scores["scores"].items()}
        assert test["rehearsal"] < test["equal"] - 0.02
        assert weights["signals"][KNOWN.suited]["significant"]
        assert weights["weights"][KNOWN.suited] > 1 / len(weights["weights"])
        assert not weights["signals"][KNOWN.control]["significant"]
        assert weights["weights"][KNOWN.control] < 1 / len(weights["weights"])
