"""Descriptors: regress simple physico-chemical quantities, all together or by families."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from mlopt.errors import ArgumentError

from ...files import DataError
from ..graphs import import_extra
from .regression import Regression
from .targets import by_molecule, kept

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch_geometric.data import Data

#: Molecular weight, logP and molar refractivity (Crippen), polar surface, hydrogen bond donors and acceptors, rotatable
#: bonds, rings, aromatic rings, share of sp3 carbons, by their names in `rdkit.Chem.Descriptors`.
PROPERTIES = (
    "MolWt",
    "MolLogP",
    "MolMR",
    "TPSA",
    "NumHDonors",
    "NumHAcceptors",
    "NumRotatableBonds",
    "RingCount",
    "NumAromaticRings",
    "FractionCSP3",
)
#: Families of properties; no property is in two. The number of valence electrons counts as size, with which it grows.
#: Sums over surface areas use E-states and not partial charges: RDKit adds an atom without a charge to its last bin.
FAMILIES = {
    "size": ("MolWt", "HeavyAtomCount", "NumValenceElectrons", "LabuteASA", "MolMR"),
    "polarity": ("TPSA", "NumHDonors", "NumHAcceptors", "MolLogP"),
    "electronics": (
        "MaxPartialCharge",
        "MinPartialCharge",
        "MaxEStateIndex",
        "MinEStateIndex",
        "NumRadicalElectrons",
        "NumHeteroatoms",
        *(f"EState_VSA{bin}" for bin in range(1, 12)),
    ),
    "topology": (
        "BalabanJ",
        "BertzCT",
        "Chi1",
        "Chi3v",
        "Chi4v",
        "Kappa2",
        "Kappa3",
        "Phi",
        "HallKierAlpha",
        "RingCount",
        "NumAromaticRings",
        "NumSpiroAtoms",
        "NumBridgeheadAtoms",
        "NumRotatableBonds",
        "FractionCSP3",
    ),
}
# Kappa 3 divides by the number of paths of three bonds, which is near zero in compact molecules: 18,691 for SF6.
_HEAVY_TAILED = ("BertzCT", "Kappa3")


@kept
def descriptors(corpus: Sequence[Data], properties: Sequence[str]) -> Tensor:
    """Return properties of each molecule, float32 (M, F), in their own units, NaN where RDKit does not define them.

    A property x with a heavy tail, such as `BertzCT`, is returned as sign(x) log(1 + |x|).

    Args:
        corpus: the molecules.
        properties: names in `rdkit.Chem.Descriptors`.

    Raises:
        ArgumentError: RDKit has no such property.
        ValueError: a property is not finite in float32; the message names it and the molecule.
    """
    known = dict(import_extra("rdkit.Chem.Descriptors").descList)
    for name in properties:
        if name not in known:
            raise ArgumentError(f"RDKit has no descriptor {name!r}; rdkit.Chem.Descriptors.descList lists its names")
    table = torch.cat(by_molecule(partial(_rows, properties=properties), corpus, "descriptors"))
    for row, column in table.isinf().nonzero().tolist():
        raise DataError(
            f"{properties[column]} of molecule {row} of the corpus, {corpus[row].smiles!r}, is not finite in float32; "
            "leave the molecule or the property out"
        )
    heavy = [column for column, name in enumerate(properties) if name in _HEAVY_TAILED]
    table[:, heavy] = table[:, heavy].sign() * table[:, heavy].abs().log1p()
    return table


def _rows(molecules: Sequence[Any], properties: Sequence[str]) -> Tensor:
    known = dict(import_extra("rdkit.Chem.Descriptors").descList)
    rows = [[float(known[name](molecule)) for name in properties] for molecule in molecules]
    return torch.tensor(rows, dtype=torch.float32)


class Descriptors(Regression):
    """Mean squared error of a molecule's descriptors, each standardised by its mean and deviation over the corpus.

    The logP of Crippen (`MolLogP`, in the default and in the family "polarity") is close to the labels of ESOL and
    Lipophilicity: a gain on those tasks is in part the gain of a near label.

    Args:
        properties: names in `rdkit.Chem.Descriptors`.
        name: the objective's name. Different properties need different names.

    Example:
        >>> from mlopt.recipes.tapweight.molecules.objectives import Descriptors
        >>> Descriptors(("TPSA", "NumHDonors"), "surface").name
        'surface'
    """

    noun = "descriptors"

    def __init__(self, properties: Sequence[str] = PROPERTIES, name: str = "descriptors") -> None:
        self.properties, self.name = tuple(properties), name
        # Not the bare name: a graph has a method `size`.
        self.key = name if name == "descriptors" else f"descriptors_{name}"

    def table(self, corpus: Sequence[Data]) -> Tensor:
        """Return the properties of each molecule."""
        return descriptors(corpus, self.properties)
