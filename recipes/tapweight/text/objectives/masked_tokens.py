"""Masked tokens: predict hidden tokens of a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch.nn.functional import cross_entropy
from transformers import DataCollatorForLanguageModeling

from mlopt.errors import ArgumentError

from ...objective import Objective, check_rate

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from ...encoder import Encoder
    from ..batches import Batch
    from ..encoder import TextEncoder


class MaskedTokens(Objective):
    """Cross entropy of hidden tokens, given the rest of the text: masked language modelling.

    80% of the chosen tokens become the mask token, 10% a random token, and 10% stay. The head is the checkpoint's own, if it
    has one. A new head, tied to the embeddings, needs a while to become useful; `remarks` reports it.

    Args:
        tokenizer: the tokenizer of the encoder.
        rate: the share of the tokens to choose.

    Raises:
        ValueError: the tokenizer has no mask token.

    Source: Devlin et al., "BERT", NAACL 2019, section 3.1; the masking is that of transformers'
    `DataCollatorForLanguageModeling`.
    """

    name = "masked_tokens"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rate: float = 0.15) -> None:
        if tokenizer.mask_token is None:
            raise ArgumentError(
                f"{self.name} hides tokens behind a mask token, but this tokenizer has none; leave the objective out, or "
                "use an encoder that was trained with one"
            )
        self._collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=check_rate("rate", rate))
        self.remarks: list[str] = []

    def head(self, encoder: Encoder) -> nn.Module:
        """Return the encoder's head from tokens to the vocabulary."""
        own = cast("TextEncoder", encoder)
        if not own.has_masked_token_head:
            self.remarks = [
                "the checkpoint has no head for masked tokens; a new one, tied to the embeddings, is trained"
            ]
        return own.masked_token_head()

    def view(self, batch: Batch) -> Batch:
        """Hide tokens: `masked` (B, S) marks them, and `hidden_tokens` (K,) holds the originals."""
        original = batch["input_ids"]
        # The collator draws on the CPU, and writes into its argument.
        ids, labels = self._collator.torch_mask_tokens(original.cpu().clone(), batch["special_tokens_mask"].cpu())
        ids, labels = ids.to(original.device), labels.to(original.device)
        masked = labels != -100
        return {**batch, "input_ids": ids, "masked": masked, "hidden_tokens": labels[masked]}

    def loss(self, encoder: Encoder, head: nn.Module, view: Batch) -> Tensor:
        """Return the mean over the hidden tokens; 0 if there are none."""
        logits = head(encoder(view)[view["masked"]])
        return cross_entropy(logits, view["hidden_tokens"], reduction="sum") / max(len(logits), 1)
