"""Random labels: a control that carries no language."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...control import HashedLabels
from ..heads import LinearHead
from .targets import attach

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from ...encoder import Encoder
    from ..batches import Example


class RandomLabels(HashedLabels):
    """Cross entropy of labels that are a hash of the text."""

    def prepare(self, corpus: Sequence[Example], seed: int) -> None:
        """Attach a label to each example.

        Raises:
            ValueError: the corpus does not keep the labels that are attached to its examples.
        """
        attach(corpus, self.key, (self.label(example["text"]) for example in corpus), self.name)

    def head(self, encoder: Encoder) -> nn.Module:
        """Build a linear map to labels."""
        return LinearHead(encoder.width, self.classes)
