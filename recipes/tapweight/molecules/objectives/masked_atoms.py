"""Masked atoms: predict the element of hidden atoms."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ...objective import Objective, check_rate
from ..encoder import ATOM_MASK, ATOM_SIZES
from .masking import choose

if TYPE_CHECKING:
    from torch import Tensor
    from torch_geometric.data import Batch

    from ...encoder import Encoder


class MaskedAtoms(Objective):
    """Cross entropy of the atomic numbers of hidden atoms, given the rest of the molecule.

    A hidden atom has the mask token in all of its 9 features. Its bonds, and its neighbours' degrees and numbers of
    hydrogens, stay: they are the context to predict from.

    Args:
        rate: the share of a batch's atoms to hide; at least one.

    Source: Hu et al., "Strategies for Pre-training Graph Neural Networks", ICLR 2020, section 3.1.2.
    """

    name = "masked_atoms"

    def __init__(self, rate: float = 0.15) -> None:
        self.rate = check_rate("rate", rate)

    def head(self, encoder: Encoder) -> nn.Module:
        """Build a linear map from an atom's embedding to atomic numbers."""
        return nn.Linear(encoder.width, ATOM_SIZES["atomic_num"])

    def view(self, batch: Batch) -> Batch:
        """Hide atoms: `masked_atoms` (K,) holds their indices, `atomic_numbers` (K,) their elements."""
        masked = choose(torch.arange(len(batch.x), device=batch.x.device), self.rate)
        view = copy.copy(batch)
        view.x = batch.x.clone()
        view.x[masked] = ATOM_MASK.to(batch.x.device)
        view.masked_atoms, view.atomic_numbers = masked, batch.x[masked, 0]
        return view

    def loss(self, encoder: Encoder, head: nn.Module, view: Batch) -> Tensor:
        """Return the mean over the hidden atoms."""
        return cross_entropy(head(encoder(view)[view.masked_atoms]), view.atomic_numbers)
