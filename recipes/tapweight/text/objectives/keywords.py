"""Keywords: predict the words that tell a text from the others of the corpus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mlopt.errors import ArgumentError

from ...objective import Objective, prepared
from ..heads import LinearHead
from .targets import attach, tfidf

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from ...encoder import Encoder
    from ..batches import Batch, Example


class Keywords(Objective):
    """Cross entropy of the words with the largest TF-IDF weights of a text.

    With K_i the `most` words of text i with the largest weights w_ij, and p_i the softmax over all `words` that the head
    predicts,

        loss = - mean_i sum_{j in K_i} ( w_ij / sum_{k in K_i} w_ik ) log p_ij

    The words are the most frequent ones of the corpus that at least two texts have, without English stop words. A text
    without any of them does not count.

    Args:
        words: the number of words to predict.
        most: the number of words of one text that count.

    Raises:
        ArgumentError: fewer than two words, or `most` below one.
    """

    name = "keywords"

    def __init__(self, words: int = 512, most: int = 8) -> None:
        if words < 2:
            raise ArgumentError(f"words must be at least 2; got {words!r}")
        if most < 1:
            raise ArgumentError(f"most must be at least 1; got {most!r}")
        self.words, self.most = words, most
        self.key = f"keywords_{words}_{most}"
        self._outputs: int | None = None

    def prepare(self, corpus: Sequence[Example], seed: int) -> None:
        """Attach to each text its words (most,) and their shares (most,), which are 0 beyond the last word.

        Raises:
            DataError: there are fewer than two words to predict.
        """
        weights = tfidf(corpus, self.words, self.name)
        self._outputs = weights.shape[1]
        columns, shares = largest(weights, self.most)
        attach(corpus, self.key, columns, self.name)
        attach(corpus, f"{self.key}_shares", shares, self.name)

    def head(self, encoder: Encoder) -> nn.Module:
        """Build a linear map to words."""
        return LinearHead(encoder.width, prepared(self._outputs, self))

    def loss(self, encoder: Encoder, head: nn.Module, view: Batch) -> Tensor:
        """Return the mean over the texts that count; 0 if none does."""
        logs: Tensor = head(encoder.pool(view)).log_softmax(1)
        shares: Tensor = view[f"{self.key}_shares"].to(logs)
        losses = -(logs.gather(1, view[self.key]) * shares).sum(1)
        return losses.sum() / (shares[:, 0] > 0).sum().clamp(min=1)


def largest(weights: Any, most: int) -> tuple[Tensor, Tensor]:
    """Return the columns (M, most) of the largest weights of each row of a sparse matrix, and their shares of the sum.

    The largest comes first, of equal ones the first. A row with fewer weights has column 0 and share 0 in their place.
    """
    columns = torch.zeros(weights.shape[0], most, dtype=torch.long)
    shares = torch.zeros(weights.shape[0], most)
    for row, (start, end) in enumerate(zip(weights.indptr, weights.indptr[1:], strict=False)):
        values, order = torch.from_numpy(weights.data[start:end]).sort(descending=True, stable=True)
        values, order = values[:most], order[:most]
        columns[row, : len(order)] = torch.from_numpy(weights.indices[start:end])[order].long()
        shares[row, : len(values)] = values / values.sum()
    return columns, shares
