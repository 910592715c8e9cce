"""Masked bonds: predict the types of hidden bonds."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.functional import cross_entropy

from ...objective import Objective, check_rate
from ..encoder import ATOM_MASK, ATOM_SIZES, BOND_MASK, BOND_SIZES
from .masking import choose_bonds

if TYPE_CHECKING:
    from torch import Tensor
    from torch_geometric.data import Batch

    from ...encoder import Encoder

# The number of hydrogens or the degree leaves a single hidden bond no choice: its type is the remaining valence.
# Hybridisation, aromaticity and chirality nearly determine it.
_REVEALING = [[*ATOM_SIZES].index(name) for name in ("chirality", "degree", "num_hs", "hybridization", "is_aromatic")]


class MaskedBonds(Objective):
    """Cross entropy of the types of hidden bonds, given their two atoms' embeddings, h_i + h_j.

    A hidden bond has the mask token in its 3 features, in both directions, and its two atoms have it in chirality,
    degree, number of hydrogens, hybridisation and aromaticity. The context to predict from is the rest: the elements and
    charges, the membership in rings, and the features of other atoms and bonds (a ring whose other bonds are aromatic, say).

    A batch without bonds (methane, single ions) has loss zero, with zero gradients.

    Args:
        rate: the share of a batch's bonds to hide; at least one if the batch has any.

    Source: Hu et al., "Strategies for Pre-training Graph Neural Networks", ICLR 2020, section 3.1.2.
    """

    name = "masked_bonds"

    def __init__(self, rate: float = 0.15) -> None:
        self.rate = check_rate("rate", rate)

    def head(self, encoder: Encoder) -> nn.Module:
        """Build a map from the sum of two atoms' embeddings to bond types."""
        width = encoder.width
        return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, BOND_SIZES["bond_type"]))

    def view(self, batch: Batch) -> Batch:
        """Hide bonds: `masked_bonds` (2, K) holds the atoms at their ends, `bond_types` (K,) their types."""
        chosen, edges = choose_bonds(batch.edge_index, len(batch.x), self.rate)
        ends = batch.edge_index[:, chosen]
        view = copy.copy(batch)
        view.x, view.edge_attr = batch.x.clone(), batch.edge_attr.clone()
        view.edge_attr[edges] = BOND_MASK.to(batch.x.device)
        for column in _REVEALING:
            view.x[ends, column] = int(ATOM_MASK[column])
        view.masked_bonds, view.bond_types = ends, batch.edge_attr[chosen, 0]
        return view

    def loss(self, encoder: Encoder, head: nn.Module, view: Batch) -> Tensor:
        """Return the mean over the hidden bonds, zero if there are none."""
        logits = head(encoder(view)[view.masked_bonds].sum(0))
        return cross_entropy(logits, view.bond_types, reduction="sum") / max(1, len(logits))
