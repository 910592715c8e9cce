"""Dividing molecules into training, validation and test splits."""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from .data import DataError, import_extra

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..task import Split

_NAMES: tuple[Split, ...] = ("train", "valid", "test")
_EIGHT_ONE_ONE = (0.8, 0.1, 0.1)


def scaffold_split(
    smiles: Sequence[str], fractions: Sequence[float] = _EIGHT_ONE_ONE, *, chirality: bool = True
) -> dict[Split, list[int]]:
    """Split molecules so that no Bemis-Murcko scaffold is in two splits.

    Groups of one scaffold, the largest first (of equally large ones, the one that starts last first), go whole into
    train while it keeps to its fraction, else into valid while train and valid keep to theirs, else into test.

    Args:
        smiles: SMILES that RDKit can parse.
        fractions: of train, valid and test; positive, with sum 1.
        chirality: tell scaffolds apart that differ in stereochemistry (Hu et al., 2020: Strategies for pre-training
            graph neural networks), or not (MoleculeNet's custom, Wu et al., 2018).

    Returns:
        0-based indices of train, valid and test, group by group.

    Raises:
        DataError: where the fractions are wrong, a SMILES cannot be parsed, or a split would be empty.
    """
    _check(fractions)
    groups: dict[str, list[int]] = defaultdict(list)
    for index, one in enumerate(smiles):
        groups[_scaffold(index, one, chirality=chirality)].append(index)
    train_end, valid_end, _ = _ends(len(smiles), fractions)
    splits: dict[Split, list[int]] = {name: [] for name in _NAMES}
    for group in sorted(groups.values(), key=lambda group: (len(group), group[0]), reverse=True):
        if len(splits["train"]) + len(group) <= train_end:
            splits["train"] += group
        elif len(splits["train"]) + len(splits["valid"]) + len(group) <= valid_end:
            splits["valid"] += group
        else:
            splits["test"] += group
    for name, indices in splits.items():
        if not indices:
            raise DataError(
                f"{len(smiles)} molecules of {len(groups)} scaffolds leave the {name} split empty: a scaffold is never "
                "divided; take a random split, other fractions or more molecules"
            )
    return splits


def random_split(n: int, fractions: Sequence[float] = _EIGHT_ONE_ONE, seed: int = 0) -> dict[Split, list[int]]:
    """Split `n` examples at random.

    Args:
        n: number of examples.
        fractions: of train, valid and test; positive, with sum 1.
        seed: of the permutation; torch's global generator is not touched.

    Returns:
        0-based indices of train, valid and test, each in ascending order.

    Raises:
        DataError: where the fractions are wrong or a split would be empty.
    """
    _check(fractions)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    ends = _ends(n, fractions)
    splits = {name: sorted(order[start:end]) for name, start, end in zip(_NAMES, [0, *ends], ends, strict=False)}
    for name, indices in splits.items():
        if not indices:
            raise DataError(
                f"{n} molecules are too few for the {name} split at fractions={tuple(fractions)}; give more"
            )
    return splits


def _check(fractions: Sequence[float]) -> None:
    """Check that three positive fractions sum to 1."""
    valid = len(fractions) == 3 and all(fraction > 0 for fraction in fractions)
    if not valid or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise DataError(
            f"fractions={tuple(fractions)!r}: give three positive numbers (train, valid, test) whose sum is 1"
        )


def _ends(n: int, fractions: Sequence[float]) -> list[int]:
    """Return the largest sizes of train, train and valid, and all; the slack is for sums such as 0.7 + 0.1."""
    return [*(math.floor(part * n + 1e-6) for part in list(accumulate(fractions))[:2]), n]


def _scaffold(index: int, smiles: str, *, chirality: bool) -> str:
    """Return the SMILES of a molecule's Bemis-Murcko scaffold; empty for a molecule without a ring."""
    murcko = import_extra("rdkit.Chem.Scaffolds.MurckoScaffold")
    with import_extra("rdkit.rdBase").BlockLogs():
        molecule = import_extra("rdkit.Chem").MolFromSmiles(smiles)
        if molecule is None:
            raise DataError(f"smiles[{index}]={smiles!r} is no molecule; leave it out before splitting")
        scaffold: str = murcko.MurckoScaffoldSmiles(mol=molecule, includeChirality=chirality)
    return scaffold
