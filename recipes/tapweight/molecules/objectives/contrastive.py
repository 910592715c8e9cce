"""Contrastive views: match two corrupted copies of a molecule."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from mlopt.errors import ArgumentError

from ...objective import Objective, check_rate
from ..encoder import ATOM_MASK
from .masking import choose, choose_bonds

if TYPE_CHECKING:
    from torch import Tensor
    from torch_geometric.data import Batch

    from ...encoder import Encoder


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Return the normalised temperature-scaled cross entropy of two views.

    With z the 2B rows of both views, each of unit length, and j(i) the other view of the same example,

        loss = - mean_i log( exp(z_i . z_j(i) / temperature) / sum_{k != i} exp(z_i . z_k / temperature) )

    Args:
        first: the projections of the first view (B, D).
        second: those of the second view (B, D).
        temperature: the scale of the similarities.

    Source: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020, eq. 1.
    """
    projections = normalize(torch.cat([first, second]), dim=1)
    similarity = projections @ projections.T / temperature
    similarity = similarity.masked_fill(torch.eye(len(similarity), dtype=torch.bool, device=first.device), -math.inf)
    partner = torch.arange(len(similarity), device=first.device).roll(len(first))
    return cross_entropy(similarity, partner)


class ContrastiveViews(Objective):
    """NT-Xent between two views of each molecule, in which random atoms are masked and random bonds removed.

    The same molecule twice in one batch counts as two different ones.

    Args:
        mask_rate: the share of a batch's atoms to mask in each view.
        drop_rate: the share of a batch's bonds to remove in each view.
        temperature: the scale of the similarities.

    Source: Wang et al., "Molecular contrastive learning of representations via graph neural networks", Nature Machine
    Intelligence 2022 (rates and temperature); the loss is `nt_xent`.
    """

    name, passes = "contrastive", 2

    def __init__(self, mask_rate: float = 0.25, drop_rate: float = 0.25, temperature: float = 0.1) -> None:
        if temperature <= 0:
            raise ArgumentError(f"temperature must be above 0; got {temperature!r}")
        self.mask_rate = check_rate("mask_rate", mask_rate)
        self.drop_rate = check_rate("drop_rate", drop_rate)
        self.temperature = temperature

    def head(self, encoder: Encoder) -> nn.Module:
        """Build the projection head."""
        width = encoder.width
        return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def view(self, batch: Batch) -> tuple[Batch, Batch]:
        """Return two corrupted copies.

        Raises:
            ValueError: the batch holds one molecule, which has nothing to be compared with.
        """
        if batch.num_graphs < 2:
            raise ArgumentError(
                f"{self.name} compares molecules with each other, but the batch holds {batch.num_graphs}: "
                "use batches of at least 2 (and drop a last, smaller batch)"
            )
        return self._corrupt(batch), self._corrupt(batch)

    def loss(self, encoder: Encoder, head: nn.Module, view: tuple[Batch, Batch]) -> Tensor:
        """Return the mean over both views of all molecules."""
        first, second = (head(encoder.pool(corrupted)) for corrupted in view)
        return nt_xent(first, second, self.temperature)

    def _corrupt(self, batch: Batch) -> Batch:
        _, dropped = choose_bonds(batch.edge_index, len(batch.x), self.drop_rate)
        view = copy.copy(batch)
        view.x = batch.x.clone()
        view.x[choose(torch.arange(len(view.x), device=view.x.device), self.mask_rate)] = ATOM_MASK.to(view.x.device)
        view.edge_index, view.edge_attr = batch.edge_index[:, ~dropped], batch.edge_attr[~dropped]
        return view
