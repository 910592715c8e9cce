"""Contrast: match two passes over a text, each with its own dropout masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from mlopt.errors import ArgumentError

from ...objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from ...encoder import Encoder
    from ..batches import Batch
    from ..encoder import TextEncoder


class Contrastive(Objective):
    """Cross entropy of finding a text's second pass among those of the whole batch: unsupervised SimCSE.

    With z_i and z'_i the projections of text i in two passes, each of unit length,

        loss = - mean_i log( exp(z_i . z'_i / temperature) / sum_j exp(z_i . z'_j / temperature) )

    Only dropout makes the passes differ; `remarks` reports an encoder without it. The same text twice in one batch counts as
    two different texts.

    Args:
        temperature: the scale of the similarities.

    Source: Gao, Yao & Chen, "SimCSE: Simple Contrastive Learning of Sentence Embeddings", EMNLP 2021, eq. 4.
    """

    name, passes = "contrastive", 2

    def __init__(self, temperature: float = 0.05) -> None:
        if temperature <= 0:
            raise ArgumentError(f"temperature must be above 0; got {temperature!r}")
        self.temperature = temperature
        self.remarks: list[str] = []

    def head(self, encoder: Encoder) -> nn.Module:
        """Build the projection, a layer with a tanh."""
        if not cast("TextEncoder", encoder).has_dropout:
            self.remarks = ["the encoder has no dropout, so its two passes over a text are the same"]
        return nn.Sequential(nn.Linear(encoder.width, encoder.width), nn.Tanh())

    def view(self, batch: Batch) -> Batch:
        """Return each text twice, all first passes before all second ones.

        Raises:
            ValueError: the batch holds one text, which has nothing to be compared with.
        """
        count = len(batch["input_ids"])
        if count < 2:
            raise ArgumentError(
                f"{self.name} compares texts with each other, but the batch holds {count}: use at least 2"
            )
        return {key: torch.cat([value, value]) for key, value in batch.items()}

    def loss(self, encoder: Encoder, head: nn.Module, view: Batch) -> Tensor:
        """Return the mean over the texts."""
        first, second = normalize(head(encoder.pool(view)), dim=1).chunk(2)
        return cross_entropy(first @ second.T / self.temperature, torch.arange(len(first), device=first.device))
