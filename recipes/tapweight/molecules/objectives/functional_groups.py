"""Functional groups: predict their presence in a molecule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ...objective import Objective, prepared
from .fragment_counts import fragment_counts
from .targets import attach, varying_columns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch_geometric.data import Batch, Data

    from ...encoder import Encoder


class FunctionalGroups(Objective):
    """Binary cross entropy of the presence of RDKit's functional groups, a mean over groups and molecules.

    Source: Rong et al., "Self-Supervised Graph Transformer on Large-Scale Molecular Data", NeurIPS 2020 (GROVER's motif
    prediction).
    """

    name = "functional_groups"

    def __init__(self) -> None:
        self.columns: list[int] | None = None

    def prepare(self, corpus: Sequence[Data], seed: int) -> None:
        """Attach `fragment_counts` (1, F) to each graph, and leave out groups that all molecules have, or none."""
        counts = attach(corpus, "fragment_counts", lambda: fragment_counts(corpus))
        self.columns = varying_columns(counts > 0, "functional groups")

    def head(self, encoder: Encoder) -> nn.Module:
        """Build a linear map to one logit a group."""
        return nn.Linear(encoder.width, len(prepared(self.columns, self)))

    def loss(self, encoder: Encoder, head: nn.Module, view: Batch) -> Tensor:
        """Return the mean over groups and molecules."""
        logits = head(encoder.pool(view))
        present = view.fragment_counts[:, self.columns] > 0
        return binary_cross_entropy_with_logits(logits, present.to(logits.dtype))
