"""Random labels: a control that carries no chemistry."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ...objective import Objective, hashed_label
from .targets import attach

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch_geometric.data import Batch, Data

    from ...encoder import Encoder


class RandomLabels(Objective):
    """Cross entropy of labels that are a hash of the SMILES: a control, which can only be learned by heart.

    A method that weighs objectives should give this one less than its equal share.

    Args:
        classes: the number of labels.
    """

    name = "random_labels"

    def __init__(self, classes: int = 8) -> None:
        if classes < 2:
            raise ValueError(f"classes must be at least 2; got {classes!r}")
        self.classes = classes
        self.attribute = f"random_labels_{classes}"

    def prepare(self, corpus: Sequence[Data], seed: int) -> None:
        """Attach `random_labels_C` (1,) to each graph. The labels do not depend on the seed."""
        attach(
            corpus,
            self.attribute,
            lambda: torch.tensor([hashed_label(graph.smiles, self.classes) for graph in corpus]),
        )

    def head(self, encoder: Encoder) -> nn.Module:
        """Build a linear map to labels."""
        return nn.Linear(encoder.width, self.classes)

    def loss(self, encoder: Encoder, head: nn.Module, view: Batch) -> Tensor:
        """Return the mean over the molecules."""
        return cross_entropy(head(encoder.pool(view)), view[self.attribute])
