"""Functional groups: predict their presence in a molecule."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ...objective import Objective, prepared
from ..data import import_extra
from .targets import attach, parse, varying_columns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch_geometric.data import Batch, Data

    from ...encoder import Encoder


def functional_groups(corpus: Sequence[Data]) -> Tensor:
    """Return the presence of RDKit's fragments (`fr_*`, in alphabetical order) in each molecule, uint8 (M, F)."""
    fragments = import_extra("rdkit.Chem.Fragments")
    counts = [getattr(fragments, name) for name in sorted(vars(fragments)) if name.startswith("fr_")]
    return torch.tensor([[count(molecule) > 0 for count in counts] for molecule in parse(corpus)], dtype=torch.uint8)


class FunctionalGroups(Objective):
    """Binary cross entropy of the presence of RDKit's functional groups, a mean over groups and molecules.

    Source: Rong et al., "Self-Supervised Graph Transformer on Large-Scale Molecular Data", NeurIPS 2020 (GROVER's motif
    prediction).
    """

    name = "functional_groups"

    def __init__(self) -> None:
        self.columns: list[int] | None = None

    def prepare(self, corpus: Sequence[Data], seed: int) -> None:
        """Attach `functional_groups` (1, F) to each graph, and leave out groups that all molecules have, or none."""
        table = attach(corpus, "functional_groups", lambda: functional_groups(corpus))
        self.columns = varying_columns(table, "functional groups")

    def head(self, encoder: Encoder) -> nn.Module:
        """Build a linear map to one logit a group."""
        return nn.Linear(encoder.width, len(prepared(self.columns, self)))

    def loss(self, encoder: Encoder, head: nn.Module, view: Batch) -> Tensor:
        """Return the mean over groups and molecules."""
        logits = head(encoder.pool(view))
        return binary_cross_entropy_with_logits(logits, view.functional_groups[:, self.columns].to(logits.dtype))
