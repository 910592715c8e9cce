"""Sentence order: detect the texts whose halves were swapped."""

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


class SentenceOrder(Objective):
    """Cross entropy of detecting swapped halves of a text.

    A text's tokens are cut in half, and the halves are swapped with probability 1/2, drawn again each time. A text of fewer
    than two tokens does not count.

    Source: Lan et al., "ALBERT", ICLR 2020, section 3.1, which orders two consecutive segments; TapWeight's release orders
    the halves of one text.
    """

    name = "sentence_order"

    def head(self, encoder: Encoder) -> nn.Module:
        """Build a linear map to the two orders."""
        return LinearHead(encoder.width, 2)

    def view(self, batch: Batch) -> Batch:
        """Swap halves: `swapped` (B,) is 1 for a swapped text, 0 for another, -100 for one that is too short."""
        ids, own = batch["input_ids"], batch["special_tokens_mask"] == 0
        counts = own.sum(1)
        swapped = torch.bernoulli(torch.full(counts.shape, 0.5)).to(counts)
        # In a swapped text, the place of rank r among its n tokens gets the token of rank (r + n // 2) mod n.
        ranks = own.cumsum(1) - 1
        source = (ranks + (counts // 2 * swapped)[:, None]) % counts.clamp(min=1)[:, None]
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        # The place of each rank: a text's own tokens first, in their order.
        order = torch.where(own, places, ids.shape[1]).sort(1).values.clamp(max=ids.shape[1] - 1)
        moved = torch.where(own, ids.gather(1, order.gather(1, source)), ids)
        return {**batch, "input_ids": moved, "swapped": torch.where(counts < 2, -100, swapped)}

    def loss(self, encoder: Encoder, head: nn.Module, view: Batch) -> Tensor:
        """Return the mean over the texts that count; 0 if none does."""
        logits = head(encoder.pool(view))
        loss = cross_entropy(logits, view["swapped"], reduction="sum", ignore_index=-100)
        count: Tensor = (view["swapped"] != -100).sum().clamp(min=1)
        return loss / count
