"""Random choices of atoms and bonds, drawn from torch's global generator."""

from __future__ import annotations

import torch
from torch import Tensor


def choose(candidates: Tensor, rate: float) -> Tensor:
    """Return a random share `rate` of `candidates` (M,); at least one if there are any."""
    count = max(1, round(rate * len(candidates)))
    return candidates[torch.randperm(len(candidates), device=candidates.device)[:count]]


def choose_bonds(ends: Tensor, nodes: int, rate: float) -> tuple[Tensor, Tensor]:
    """Choose a random share of the bonds, both directions of a bond together.

    Args:
        ends: the edges (2, E), each bond twice.
        nodes: the number of atoms.
        rate: the share.

    Returns:
        The chosen bonds, one edge of each (K,), and a mask of the edges that belong to them (E,), boolean.
    """
    low, high = ends.amin(0), ends.amax(0)
    bonds = low * nodes + high  # the same number in both directions
    chosen = choose((ends[0] < ends[1]).nonzero().squeeze(1), rate)
    return chosen, torch.isin(bonds, bonds[chosen])
