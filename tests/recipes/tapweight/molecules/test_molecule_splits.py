"""Scaffold splits equal the published ones; random splits are partitions of the requested sizes."""

from __future__ import annotations

import json
from itertools import chain
from typing import TYPE_CHECKING

import pytest
import torch

from mlopt.recipes.tapweight.files import DataError
from mlopt.recipes.tapweight.molecules.data import read_table
from mlopt.recipes.tapweight.molecules.splits import random_split, scaffold_split

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("name", ["bbbp", "bace", "bace_pic50", "clintox", "esol", "freesolv"])
def test_scaffold_split_equals_the_reference(data_folder: Path, name: str) -> None:
    reference = json.loads((data_folder / "mol" / "splits" / f"{name}_scaffold.json").read_text())
    lines = (data_folder / "mol" / f"{name}.csv").read_text().splitlines()[1:]
    smiles = [line.split(",")[0] for line in lines]
    for key, chirality in (("chirality", True), ("no_chirality", False)):
        splits = scaffold_split(smiles, chirality=chirality)
        assert list(splits) == ["train", "valid", "test"]
        assert splits == {split: reference[key][split] for split in splits}


def test_chirality_matters(data_folder: Path) -> None:
    smiles = read_table(data_folder / "mol" / "bace.csv").smiles
    assert scaffold_split(smiles) != scaffold_split(smiles, chirality=False)


def test_scaffold_split_by_hand() -> None:
    # Benzene (rows 0, 1, 5), no ring (2, 3), pyridine (4), cyclohexane (6); of equal ones the last is served first.
    smiles = ["c1ccccc1", "Cc1ccccc1", "CC", "CCC", "c1ccncc1", "Oc1ccccc1", "C1CCCCC1"]
    splits = scaffold_split(smiles, (5 / 7, 1 / 7, 1 / 7))
    assert splits == {"train": [0, 1, 5, 2, 3], "valid": [6], "test": [4]}


def test_a_sum_of_fractions_that_rounds_down_loses_no_molecule() -> None:
    assert 0.7 + 0.1 < 0.8
    rings = [f"C1{'C' * length}1" for length in range(2, 12)]
    assert [len(part) for part in scaffold_split(rings, (0.7, 0.1, 0.2)).values()] == [7, 1, 2]
    assert [len(part) for part in random_split(10, (0.7, 0.1, 0.2)).values()] == [7, 1, 2]


def test_random_split_is_a_partition_and_replays() -> None:
    state = torch.get_rng_state()
    splits = random_split(1_000, (0.8, 0.1, 0.1), seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert [len(part) for part in splits.values()] == [800, 100, 100]
    assert sorted(chain.from_iterable(splits.values())) == list(range(1_000))
    assert splits == random_split(1_000, (0.8, 0.1, 0.1), seed=3)
    assert splits != random_split(1_000, (0.8, 0.1, 0.1), seed=4)


@pytest.mark.parametrize(
    "fractions", [(0.8, 0.1), (0.8, 0.1, 0.2), (0.9, 0.1, 0.0), (1.2, -0.1, -0.1), (float("nan"), 0.5, 0.5)]
)
def test_fractions_must_be_positive_and_sum_to_one(fractions: tuple[float, ...]) -> None:
    for split in (lambda: scaffold_split(["CC", "CO"], fractions), lambda: random_split(10, fractions)):
        with pytest.raises(DataError, match="three positive numbers"):
            split()


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(DataError, match=r"3 molecules of 1 scaffolds leave the train split empty.*--split random"):
        scaffold_split(["CC", "CCC", "CCO"])
    with pytest.raises(DataError, match="2 examples are too few for the valid split"):
        random_split(2, (0.5, 0.25, 0.25))


def test_an_invalid_smiles_is_named() -> None:
    with pytest.raises(DataError, match=r"smiles\[1\]='C1CC' is not a molecule"):
        scaffold_split(["CC", "C1CC", "CO"])
