"""Random labels: a control that carries no chemistry."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...control import HashedLabels
from .targets import attach

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch_geometric.data import Data


class RandomLabels(HashedLabels):
    """Cross entropy of labels that are a hash of the SMILES."""

    def prepare(self, corpus: Sequence[Data], seed: int) -> None:
        """Attach `random_labels_C` (1,) to each graph."""
        attach(corpus, self.key, lambda: torch.tensor([self.label(graph.smiles) for graph in corpus]))
