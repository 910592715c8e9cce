"""Shuffled words: detect the texts whose tokens were put in a random order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from ...objective import Objective
from ..heads import LinearHead

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...encoder import Encoder
    from ..batches import Batch


class ShuffledWords(Objective):
    """Cross entropy of detecting texts whose tokens were permuted.

    The tokens of a text are permuted with probability 1/2, drawn again each time. A permutation that leaves the text as it was
    counts as none. A text of fewer than two tokens does not count.
    """

    name = "shuffled_words"

    def head(self, encoder: Encoder) -> nn.Module:
        """Build a linear map to the two answers."""
        return LinearHead(encoder.width, 2)

    def view(self, batch: Batch) -> Batch:
        """Permute tokens: `shuffled` (B,) is 1 for a permuted text, 0 for another, -100 for one that is too short."""
        ids, own = batch["input_ids"], batch["special_tokens_mask"] == 0
        drawn = torch.bernoulli(torch.full((len(ids), 1), 0.5)).bool().to(ids.device)
        # Sorted by these numbers, the places of a text's own tokens come first, in random order.
        order = torch.where(own, torch.rand(ids.shape).to(ids.device), 2.0).argsort(1)
        # The place of rank r among the own tokens gets the token of the r-th of these places.
        permuted = ids.gather(1, order.gather(1, (own.cumsum(1) - 1).clamp(min=0)))
        moved = torch.where(own & drawn, permuted, ids)
        shuffled = (moved != ids).any(1).long()
        return {**batch, "input_ids": moved, "shuffled": torch.where(own.sum(1) < 2, -100, shuffled)}

    def loss(self, encoder: Encoder, head: nn.Module, view: Batch) -> Tensor:
        """Return the mean over the texts that count; 0 if none does."""
        logits = head(encoder.pool(view))
        loss = cross_entropy(logits, view["shuffled"], reduction="sum", ignore_index=-100)
        count: Tensor = (view["shuffled"] != -100).sum().clamp(min=1)
        return loss / count
