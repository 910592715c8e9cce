"""Divide molecules into training, validation and test splits."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..files import DataError
from ..splits import EIGHT_ONE_ONE, NAMES, check_fractions, ends_of, random_split, stratified_split
from .cache import cached
from .graphs import import_extra, unmapped
from .workers import by_chunks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..task import Split

__all__ = ["balanced_scaffold_split", "random_split", "scaffold_split", "stratified_split"]


def scaffold_split(
    smiles: Sequence[str], fractions: Sequence[float] = EIGHT_ONE_ONE, *, chirality: bool = True
) -> dict[Split, list[int]]:
    """Split molecules so that no Bemis-Murcko scaffold is in two splits.

    The molecules of a scaffold stay together. The largest group comes first (among equals, the one that starts last). A
    group goes into train if train keeps to its fraction, else into valid if train and valid keep to theirs, else into test.

    Args:
        smiles: SMILES that RDKit can parse.
        fractions: of train, valid and test; positive, with sum 1.
        chirality: distinguish scaffolds that differ in stereochemistry (Hu et al., 2020: Strategies for pre-training
            graph neural networks), or not (MoleculeNet's custom, Wu et al., 2018).

    Returns:
        0-based indices of train, valid and test, group by group.

    Raises:
        DataError: the fractions are wrong, a SMILES cannot be parsed, or a split would be empty.
    """
    check_fractions(fractions)
    groups = _groups(smiles, chirality=chirality)
    train_end, valid_end, _ = ends_of(len(smiles), fractions)
    splits: dict[Split, list[int]] = {name: [] for name in NAMES}
    for group in sorted(groups, key=lambda group: (len(group), group[0]), reverse=True):
        if len(splits["train"]) + len(group) <= train_end:
            splits["train"] += group
        elif len(splits["train"]) + len(splits["valid"]) + len(group) <= valid_end:
            splits["valid"] += group
        else:
            splits["test"] += group
    return _checked(splits, len(groups))


def balanced_scaffold_split(
    smiles: Sequence[str],
    labels: Tensor,
    fractions: Sequence[float] = EIGHT_ONE_ONE,
    *,
    chirality: bool = True,
    seed: int = 0,
) -> dict[Split, list[int]]:
    """Split molecules so that no Bemis-Murcko scaffold is in two splits, and each split has its share of each label.

    With n_s = (molecules, labels 0 and labels 1 of each task) of split s, and N those of all, the scaffolds, from the largest to
    the smallest, each go to the split for which sum_s |n_s / N - f_s|^2 / f_s becomes smallest; f_s is the fraction of s.

    Args:
        smiles: SMILES that RDKit can parse.
        labels: (molecules, tasks), 0 or 1; NaN if missing. Columns of other numbers are not balanced.
        fractions, chirality: as in `scaffold_split`.
        seed: the seed of the order of groups of one size.

    Returns:
        0-based indices of train, valid and test, each in ascending order.

    Raises:
        DataError: as in `scaffold_split`.
    """
    check_fractions(fractions)
    groups = _groups(smiles, chirality=chirality)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    classes = labels[:, ((labels == 0) | (labels == 1) | labels.isnan()).all(0)]
    counted = torch.cat([torch.ones(len(smiles), 1), classes == 0, classes == 1], dim=1).double()
    counts = counted / counted.sum(0).clamp(min=1)
    held = torch.zeros(len(NAMES), counts.shape[1], dtype=torch.float64)
    aims = torch.tensor(fractions, dtype=torch.float64)[:, None]
    splits: dict[Split, list[int]] = {name: [] for name in NAMES}
    for k in sorted(order, key=lambda k: -len(groups[k])):
        own = counts[groups[k]].sum(0)
        change = (((held + own - aims).square() - (held - aims).square()) / aims).sum(1)
        best = int(change.argmin())
        held[best] += own
        splits[NAMES[best]] += groups[k]
    return _checked({name: sorted(indices) for name, indices in splits.items()}, len(groups))


def _groups(smiles: Sequence[str], *, chirality: bool) -> list[list[int]]:
    """Return the indices of the molecules of each scaffold, in the order of its first molecule."""

    def compute() -> dict[str, Tensor]:
        chunks = by_chunks(partial(_scaffolds, chirality=chirality), smiles, "scaffolds")
        numbers: dict[str, int] = {}
        return {"numbers": torch.tensor([numbers.setdefault(each, len(numbers)) for chunk in chunks for each in chunk])}

    groups: dict[int, list[int]] = defaultdict(list)
    for index, number in enumerate(cached(f"scaffolds {chirality}", smiles, compute)["numbers"].tolist()):
        groups[number].append(index)
    return list(groups.values())


def _scaffolds(first: int, smiles: Sequence[str], *, chirality: bool) -> list[str]:
    return [_scaffold(first + index, text, chirality=chirality) for index, text in enumerate(smiles)]


def _checked(splits: dict[Split, list[int]], scaffolds: int) -> dict[Split, list[int]]:
    """Refuse an empty split."""
    for name, indices in splits.items():
        if not indices:
            raise DataError(
                f"{sum(map(len, splits.values()))} molecules of {scaffolds} scaffolds leave the {name} split empty: a scaffold "
                "is never divided; give --split random, other --split-fractions or more molecules"
            )
    return splits


def _scaffold(index: int, smiles: str, *, chirality: bool) -> str:
    """Return the SMILES of a molecule's Bemis-Murcko scaffold, atom maps apart; empty for a molecule without a ring."""
    murcko = import_extra("rdkit.Chem.Scaffolds.MurckoScaffold")
    with import_extra("rdkit.rdBase").BlockLogs():
        molecule = import_extra("rdkit.Chem").MolFromSmiles(smiles)
        if molecule is None:
            raise DataError(f"smiles[{index}]={smiles!r} is not a molecule; leave it out before splitting")
        scaffold: str = murcko.MurckoScaffoldSmiles(mol=unmapped(molecule), includeChirality=chirality)
    return scaffold
