"""Replaced tokens: detect the tokens of a text that were replaced."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from ...files import DataError
from ...objective import Objective, check_rate, prepared
from ..heads import LinearHead

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from ...encoder import Encoder
    from ..batches import Batch, Example

_SAMPLE = 20_000


class ReplacedTokens(Objective):
    """Binary cross entropy of detecting replaced tokens. Replacements are drawn by the frequencies of tokens in the corpus.

    There is no generator network: a replacement does not depend on its context. A replacement that equals the original token
    counts as not replaced.

    Args:
        tokenizer: the tokenizer of the encoder.
        rate: the share of the tokens to replace.

    Source: Clark et al., "ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators", ICLR 2020; unigram
    draws are its section 3.1's simplest generator.
    """

    name = "replaced_tokens"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rate: float = 0.15) -> None:
        self.rate = check_rate("rate", rate)
        self._tokenizer = tokenizer
        self._frequencies: Tensor | None = None

    def prepare(self, corpus: Sequence[Example], seed: int) -> None:
        """Count the tokens of at most 20,000 texts of the corpus."""
        order = torch.randperm(len(corpus), generator=torch.Generator().manual_seed(seed % 2**63))[:_SAMPLE].tolist()
        texts = [corpus[index]["text"] for index in order]
        counts = torch.zeros(len(self._tokenizer), dtype=torch.float64)
        tokens = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        flat = torch.tensor([token for ids in tokens for token in ids], dtype=torch.long)
        counts += torch.bincount(flat, minlength=len(counts))
        counts[self._tokenizer.all_special_ids] = 0
        if (counts > 0).sum() < 2:
            raise DataError(f"{self.name}: the corpus has fewer than two different tokens, so none can be replaced")
        self._frequencies = counts / counts.sum()

    def head(self, encoder: Encoder) -> nn.Module:
        """Build a linear map to one logit a token."""
        return LinearHead(encoder.width, 1)

    def view(self, batch: Batch) -> Batch:
        """Replace tokens: `replaced` (B, S) is 1 for a replaced token, 0 for a kept one, -1 for one that does not count."""
        ids, own = batch["input_ids"], batch["special_tokens_mask"] == 0
        chosen = torch.bernoulli(torch.full(ids.shape, self.rate)).bool().to(ids.device) & own
        drawn = torch.multinomial(prepared(self._frequencies, self), ids.numel(), replacement=True).view_as(ids).to(ids)
        replaced = torch.where(chosen, drawn, ids)
        return {**batch, "input_ids": replaced, "replaced": torch.where(own, (replaced != ids).long(), -1)}

    def loss(self, encoder: Encoder, head: nn.Module, view: Batch) -> Tensor:
        """Return the mean over the tokens; 0 if there are none."""
        counted = view["replaced"] >= 0
        logits = head(encoder(view)[counted]).squeeze(1)
        labels = view["replaced"][counted].to(logits)
        return binary_cross_entropy_with_logits(logits, labels, reduction="sum") / max(len(logits), 1)
