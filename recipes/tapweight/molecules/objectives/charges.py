"""Charges: regress the partial charge of each atom."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..graphs import import_extra
from .regression import Regression
from .targets import by_molecule, kept

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch_geometric.data import Batch, Data

    from ...encoder import Encoder


@kept
def partial_charges(corpus: Sequence[Data]) -> list[Tensor]:
    """Return the Gasteiger charge of each atom without its hydrogens, float32 (atoms, 1) for each molecule.

    A molecule that holds an element without parameters (selenium, tin, platinum) has NaN for all of its atoms.
    """
    return by_molecule(_charges, corpus, "charges")


def _charges(molecules: Sequence[Any]) -> list[Tensor]:
    compute = import_extra("rdkit.Chem.rdPartialCharges").ComputeGasteigerCharges
    for molecule in molecules:
        compute(molecule)
    return [
        torch.tensor([[atom.GetDoubleProp("_GasteigerCharge")] for atom in molecule.GetAtoms()], dtype=torch.float32)
        for molecule in molecules
    ]


class Charges(Regression):
    """Mean squared error of the partial charge of each atom, standardised over the atoms of the corpus.

    Gasteiger's charges need no conformation. They spread the electronegativity of an atom over its surroundings, so an
    atom's own features do not determine its charge. Sums over a molecule would hide which atom carries it.

    Source: Gasteiger and Marsili, "Iterative partial equalization of orbital electronegativity", Tetrahedron 1980.
    """

    name, key, noun = "charges", "charges", "partial charges"

    def table(self, corpus: Sequence[Data]) -> list[Tensor]:
        """Return the charges."""
        return partial_charges(corpus)

    def embed(self, encoder: Encoder, view: Batch) -> Tensor:
        """Return the embeddings of all atoms."""
        embeddings: Tensor = encoder(view)
        return embeddings
