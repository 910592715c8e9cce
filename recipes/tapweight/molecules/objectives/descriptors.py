"""Descriptors: regress simple physico-chemical quantities."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ...objective import Objective, prepared
from ..data import import_extra
from .targets import attach, parse, varying_columns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch_geometric.data import Batch, Data

    from ...encoder import Encoder

#: RDKit's names of: molecular weight, logP and molar refractivity (Crippen), polar surface, hydrogen bond donors and
#: acceptors, rotatable bonds, rings, aromatic rings, share of sp3 carbons.
PROPERTIES = (
    "amw",
    "CrippenClogP",
    "CrippenMR",
    "tpsa",
    "NumHBD",
    "NumHBA",
    "NumRotatableBonds",
    "NumRings",
    "NumAromaticRings",
    "FractionCSP3",
)


def descriptors(corpus: Sequence[Data]) -> Tensor:
    """Return the `PROPERTIES` of each molecule, float32 (M, 10), in their own units."""
    properties = import_extra("rdkit.Chem.rdMolDescriptors").Properties(list(PROPERTIES))
    return torch.tensor([list(properties.ComputeProperties(molecule)) for molecule in parse(corpus)])


class Descriptors(Objective):
    """Mean squared error of a molecule's descriptors, each standardised by its mean and deviation over the corpus."""

    name = "descriptors"

    def __init__(self) -> None:
        self.columns: list[int] | None = None

    def prepare(self, corpus: Sequence[Data], seed: int) -> None:
        """Attach `descriptors` (1, 10) to each graph, and leave out those that are the same for all molecules."""
        table = attach(corpus, "descriptors", lambda: descriptors(corpus))
        self.columns = varying_columns(table, "descriptors")
        varying = table[:, self.columns].double()
        self.mean, self.deviation = varying.mean(0), varying.std(0, correction=0)

    def head(self, encoder: Encoder) -> nn.Module:
        """Build a linear map to one number a descriptor."""
        return nn.Linear(encoder.width, len(prepared(self.columns, self)))

    def loss(self, encoder: Encoder, head: nn.Module, view: Batch) -> Tensor:
        """Return the mean over descriptors and molecules."""
        predicted: Tensor = head(encoder.pool(view))
        raw = view.descriptors[:, self.columns].to(predicted)
        # Not mse_loss: torch 2.13 cannot take a forward-mode derivative of the gradient of its mean.
        expected: Tensor = (raw - self.mean.to(raw)) / self.deviation.to(raw)
        return (predicted - expected).square().mean()
