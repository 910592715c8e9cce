"""Sentence position: predict from which part of its document a sentence comes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.functional import cross_entropy

from mlopt.errors import ArgumentError

from ...objective import Objective
from ..heads import LinearHead
from .targets import attach, require_places

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from ...encoder import Encoder
    from ..batches import Batch, Example


class SentencePosition(Objective):
    """Cross entropy of the part of its document, by default the fifth, that a sentence comes from.

    Sentence i (from 0) of n is in part floor(parts i / n), so a document of n < parts sentences leaves out some parts. The
    corpus is one of sentences: `read_corpus(path).sentences()`.

    Args:
        parts: the number of parts of a document.

    Raises:
        ArgumentError: fewer than two parts.
    """

    name = "sentence_position"

    def __init__(self, parts: int = 5) -> None:
        if parts < 2:
            raise ArgumentError(f"parts must be at least 2; got {parts!r}")
        self.parts = parts
        self.key = f"sentence_position_{parts}"

    def prepare(self, corpus: Sequence[Example], seed: int) -> None:
        """Attach its part to each sentence.

        Raises:
            ArgumentError: the examples are not sentences with their places in documents.
            DataError: every document is a single sentence.
        """
        require_places(corpus, self.name)
        parts = (self.parts * example["position"] // example["count"] for example in corpus)
        attach(corpus, self.key, parts, self.name)

    def head(self, encoder: Encoder) -> nn.Module:
        """Build a linear map to parts."""
        return LinearHead(encoder.width, self.parts)

    def loss(self, encoder: Encoder, head: nn.Module, view: Batch) -> Tensor:
        """Return the mean over the sentences."""
        return cross_entropy(head(encoder.pool(view)), view[self.key])
