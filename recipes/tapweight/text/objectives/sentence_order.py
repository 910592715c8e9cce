"""Sentence order: tell whether the halves of a text were swapped."""

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
    """Cross entropy of whether the halves of a text stand in their order.

    A text's tokens are cut in half, and the halves swapped with probability 1/2, drawn anew each time. The label of a text of
    fewer than two tokens says nothing: it does not count.

    Source: Lan et al., "ALBERT", ICLR 2020, section 3.1 (of two consecutive segments there); of the halves of one text in
    TapWeight's release.
    """

    name = "sentence_order"

    def head(self, encoder: Encoder) -> nn.Module:
        """Build a linear map to the two orders."""
        return LinearHead(encoder.width, 2)

    def view(self, batch: Batch) -> Batch:
        """Swap halves: `swapped` (B,) says in which texts, -100 for those too short."""
        ids, own = batch["input_ids"], batch["special_tokens_mask"] == 0
        counts = own.sum(1)
        swapped = torch.bernoulli(torch.full(counts.shape, 0.5)).to(counts)
        # Where swapped, the place of rank r among a text's n tokens gets the token of rank (r + n // 2) mod n.
        ranks = own.cumsum(1) - 1
        source = (ranks + (counts // 2 * swapped)[:, None]) % counts.clamp(min=1)[:, None]
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        # The place of each rank: a text's own tokens first, in their order.
        order = torch.where(own, places, ids.shape[1]).sort(1).values.clamp(max=ids.shape[1] - 1)
        moved = torch.where(own, ids.gather(1, order.gather(1, source)), ids)
        return {**batch, "input_ids": moved, "swapped": torch.where(counts < 2, -100, swapped)}

    def loss(self, encoder: Encoder, head: nn.Module, view: Batch) -> Tensor:
        """Return the mean over the texts that count; 0 where none does."""
        logits = head(encoder.pool(view))
        loss = cross_entropy(logits, view["swapped"], reduction="sum", ignore_index=-100)
        count: Tensor = (view["swapped"] != -100).sum().clamp(min=1)
        return loss / count
