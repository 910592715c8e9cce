"""Turn SMILES into molecules of RDKit and graphs of torch-geometric."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from mlopt.imports import import_optional
from mlopt.validation import shown

from ..examples import UnusableError

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["canonical", "graph_of", "import_extra", "unmapped"]

import_extra = partial(import_optional, user="TapWeight on molecules", requirement="'mlopt-torch[molecules]'")


def graph_of(smiles: str) -> Data:
    """Return the graph of a molecule, without atom maps; its `smiles` has the atoms in the order of the graph.

    Raises:
        UnusableError: the SMILES is not a molecule, or the molecule does not have a graph.
    """
    subject = f"{shown(smiles)} is not a molecule: "
    chem, base = import_extra("rdkit.Chem"), import_extra("rdkit.rdBase")
    with base.BlockLogs():  # the reason is raised, not printed
        molecule = chem.MolFromSmiles(smiles)
        if molecule is None:
            unchecked = chem.MolFromSmiles(smiles, sanitize=False)
            problems = chem.DetectChemistryProblems(unchecked) if unchecked is not None else ()
            raise UnusableError(" ".join(problems[0].Message().split()) if problems else "not valid SMILES", subject)
        if (plain := unmapped(molecule)) is not molecule:
            smiles = chem.MolToSmiles(plain)
            molecule = chem.MolFromSmiles(smiles)
    if not molecule.GetNumAtoms():
        raise UnusableError("the SMILES is empty", subject)
    try:
        graph: Data = import_extra("torch_geometric.utils").from_rdmol(molecule)
    except ValueError as error:  # its feature tables are finite: charges from -5 to 6, at most 10 neighbours, ...
        raise UnusableError(f"an atom or bond has no code in the graph features ({error})", subject) from error
    graph.smiles = smiles
    return graph


def unmapped(molecule: Any) -> Any:
    """Return a molecule of RDKit without atom maps, and without hydrogens that were atoms because of theirs."""
    if not any(atom.GetAtomMapNum() for atom in molecule.GetAtoms()):
        return molecule
    chem = import_extra("rdkit.Chem")
    plain = chem.Mol(molecule)
    for atom in plain.GetAtoms():
        atom.SetAtomMapNum(0)
    return chem.RemoveHs(plain)


def canonical(smiles: str) -> str:
    """Return the canonical SMILES of a molecule that RDKit can parse, without atom maps."""
    chem = import_extra("rdkit.Chem")
    with import_extra("rdkit.rdBase").BlockLogs():
        text: str = chem.MolToSmiles(unmapped(chem.MolFromSmiles(smiles)))
    return text
