"""Same document: match a sentence with its neighbour in the document."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from mlopt.errors import ArgumentError

from ...objective import Objective, prepared
from .targets import attach, require_places

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ...encoder import Encoder
    from ..batches import Batch, Collate, Example
    from ..encoder import TextEncoder


class SameDocument(Objective):
    """Cross entropy of finding a sentence's neighbour among the neighbours of all sentences of the batch.

    With z_i and z'_i the projections of sentence i and of its neighbour, each of unit length, and D_i the sentences of the
    batch that are not from the document of i,

        loss = - mean_i log( exp(z_i . z'_i / temperature) / sum_{j in D_i or j = i} exp(z_i . z'_j / temperature) )

    The neighbour is the next sentence of the document; of the last sentence, the one before. A sentence that is alone in its
    document is its own neighbour. The corpus is one of sentences: `read_corpus(path).sentences()`.

    Args:
        temperature: the scale of the similarities.

    Raises:
        ArgumentError: the temperature is not above 0.

    Source: the neighbours are those of Logeswaran & Lee, "An efficient framework for learning sentence representations"
    (Quick-Thoughts), ICLR 2018; the loss is that of SimCSE.
    """

    name, passes = "same_document", 2

    def __init__(self, temperature: float = 0.05) -> None:
        if not temperature > 0:
            raise ArgumentError(f"temperature must be above 0; got {temperature!r}")
        self.temperature = temperature
        self._corpus: Sequence[Example] | None = None
        self._neighbours: list[int] = []
        self._collate: Collate | None = None

    def prepare(self, corpus: Sequence[Example], seed: int) -> None:
        """Attach its index in the corpus to each sentence.

        Raises:
            ArgumentError: the examples are not sentences with their places in documents.
            DataError: every document is a single sentence.
        """
        require_places(corpus, self.name)
        self._corpus, self._neighbours = corpus, neighbours(corpus)
        attach(corpus, "same_document_index", range(len(corpus)), self.name)

    def head(self, encoder: Encoder) -> nn.Module:
        """Build the projection, a layer with a tanh."""
        self._collate = cast("TextEncoder", encoder).collate
        return nn.Sequential(nn.Linear(encoder.width, encoder.width), nn.Tanh())

    def view(self, batch: Batch) -> Batch:
        """Return the tokens of the sentences, then those of their neighbours (2B, S), and the documents of the sentences (B,)."""
        # A batch holds no text. With indices, the neighbours need no memory of their own.
        corpus, collate = prepared(self._corpus, self), prepared(self._collate, self)
        own = batch["same_document_index"].tolist()
        rows = [*own, *(self._neighbours[row] for row in own)]
        tokens = collate([{"text": corpus[row]["text"]} for row in rows])
        device = batch["input_ids"].device
        return {**{key: value.to(device) for key, value in tokens.items()}, "document": batch["document"]}

    def loss(self, encoder: Encoder, head: nn.Module, view: Batch) -> Tensor:
        """Return the mean over the sentences."""
        first, second = normalize(head(encoder.pool(view)), dim=1).chunk(2)
        own = torch.arange(len(first), device=first.device)
        document = view["document"]
        related = (document[:, None] == document) & (own[:, None] != own)
        return cross_entropy((first @ second.T / self.temperature).masked_fill(related, -torch.inf), own)


def neighbours(corpus: Sequence[Example]) -> list[int]:
    """Return the index of each sentence's neighbour: the next of its document, else the one before, else itself."""
    order = sorted(range(len(corpus)), key=lambda row: (corpus[row]["document"], corpus[row]["position"]))
    nearest = list(range(len(corpus)))
    for row, following in pairwise(order):
        if corpus[row]["document"] == corpus[following]["document"]:
            # The second holds for the last sentence only: of any other, the next round sets the neighbour.
            nearest[row], nearest[following] = following, row
    return nearest
