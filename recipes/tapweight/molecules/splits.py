"""Divide molecules into training, validation and test splits."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from ..files import DataError
from ..splits import EIGHT_ONE_ONE, NAMES, check_fractions, ends_of, random_split
from .data import import_extra

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..task import Split

__all__ = ["random_split", "scaffold_split"]


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
    groups: dict[str, list[int]] = defaultdict(list)
    for index, molecule in enumerate(smiles):
        groups[_scaffold(index, molecule, chirality=chirality)].append(index)
    train_end, valid_end, _ = ends_of(len(smiles), fractions)
    splits: dict[Split, list[int]] = {name: [] for name in NAMES}
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
                "divided; use a random split, other fractions or more molecules"
            )
    return splits


def _scaffold(index: int, smiles: str, *, chirality: bool) -> str:
    """Return the SMILES of a molecule's Bemis-Murcko scaffold; empty for a molecule without a ring."""
    murcko = import_extra("rdkit.Chem.Scaffolds.MurckoScaffold")
    with import_extra("rdkit.rdBase").BlockLogs():
        molecule = import_extra("rdkit.Chem").MolFromSmiles(smiles)
        if molecule is None:
            raise DataError(f"smiles[{index}]={smiles!r} is not a molecule; leave it out before splitting")
        scaffold: str = murcko.MurckoScaffoldSmiles(mol=molecule, includeChirality=chirality)
    return scaffold
