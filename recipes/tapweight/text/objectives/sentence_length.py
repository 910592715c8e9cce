"""Sentence length: predict the number of words of a text, a control that can be learned."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ...files import DataError
from ...objective import Objective
from ..heads import LinearHead
from .targets import attach

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from ...encoder import Encoder
    from ..batches import Batch, Example


class SentenceLength(Objective):
    """Mean squared error of the logarithm of a text's number of words, standardised over the corpus.

    Words are what white space separates. In contrast to `random_labels`, this control can be learned.
    """

    name = "sentence_length"

    def prepare(self, corpus: Sequence[Example], seed: int) -> None:
        """Attach its standardised length to each text.

        Raises:
            DataError: all texts have the same number of words.
        """
        logs = torch.tensor([math.log(len(example["text"].split())) for example in corpus], dtype=torch.float64)
        if logs.max() == logs.min():
            raise DataError(
                f"{self.name}: all texts of the corpus have the same number of words; leave the objective out"
            )
        lengths = (logs - logs.mean()) / logs.std(correction=0)
        attach(corpus, self.name, lengths.tolist(), self.name)

    def head(self, encoder: Encoder) -> nn.Module:
        """Build a linear map to one number."""
        return LinearHead(encoder.width, 1)

    def loss(self, encoder: Encoder, head: nn.Module, view: Batch) -> Tensor:
        """Return the mean over the texts."""
        predicted: Tensor = head(encoder.pool(view)).squeeze(1)
        # Not mse_loss: torch 2.13 cannot take a forward-mode derivative of the gradient of its mean.
        expected: Tensor = view[self.name].to(torch.promote_types(predicted.dtype, torch.float32))
        return (predicted - expected).square().mean()
