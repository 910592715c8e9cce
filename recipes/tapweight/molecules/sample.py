"""Molecules that ship with the project: well-known drugs, and recombinations of their fragments."""

from __future__ import annotations

import random
from importlib import resources
from typing import TYPE_CHECKING

from mlopt.errors import ArgumentError

from .graphs import import_extra

if TYPE_CHECKING:
    from typing import Any

__all__ = ["drugs", "recombined"]

_HEAVY_ATOMS = range(12, 38)


def drugs() -> tuple[str, ...]:
    """Return the SMILES of about 130 drugs and related molecules."""
    text = (resources.files(__package__) / "drugs.smi").read_text()
    return tuple(line.split()[0] for line in text.splitlines())


def recombined(count: int, seed: int) -> list[str]:
    """Return distinct molecules of 12 to 37 heavy atoms: halves of two drugs, cut at bonds of one BRICS type and joined.

    Args:
        count: the number of molecules.
        seed: the seed of the choice.

    Returns:
        Canonical SMILES; the same ones for the same arguments and the same release of RDKit.

    Raises:
        ValueError: the halves make fewer molecules.

    Source: BRICS, Degen et al. 2008 (doi 10.1002/cmdc.200800178).
    """
    chem, halves = import_extra("rdkit.Chem"), _halves()
    pairs = [(left, right) for lefts, rights in halves.values() for left in lefts for right in rights]
    random.Random(seed).shuffle(pairs)
    molecules: dict[str, None] = {}
    for left, right in pairs:
        if left.GetNumHeavyAtoms() + right.GetNumHeavyAtoms() in _HEAVY_ATOMS:
            molecules[chem.MolToSmiles(chem.molzip(left, right))] = None
        if len(molecules) == count:
            return list(molecules)
    raise ArgumentError(
        f"recombined: count={count}, but the halves make {len(molecules)} distinct molecules; give a smaller count"
    )


def _halves() -> dict[tuple[str, str], tuple[list[Any], list[Any]]]:
    """Return the halves on either side of each bond by the BRICS types of its ends; each half has a marked open end."""
    chem, brics = import_extra("rdkit.Chem"), import_extra("rdkit.Chem.BRICS")
    halves: dict[tuple[str, str], tuple[list[Any], list[Any]]] = {}
    for smiles in drugs():
        molecule = chem.MolFromSmiles(smiles)
        for (begin, end), types in brics.FindBRICSBonds(molecule):
            bond = molecule.GetBondBetweenAtoms(begin, end).GetIdx()
            atoms: list[tuple[int, ...]] = []
            cut = chem.FragmentOnBonds(molecule, [bond], dummyLabels=[(0, 0)])
            pieces = chem.GetMolFrags(cut, asMols=True, fragsMolAtomMapping=atoms)
            for piece in pieces:
                next(atom for atom in piece.GetAtoms() if atom.GetAtomicNum() == 0).SetAtomMapNum(1)
            first = 0 if begin in atoms[0] else 1
            lefts, rights = halves.setdefault(tuple(types), ([], []))
            lefts.append(pieces[first])
            rights.append(pieces[1 - first])
    return halves
