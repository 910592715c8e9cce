"""Random labels: a control that carries no language."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlopt.errors import ArgumentError

from ...control import HashedLabels
from ..heads import LinearHead

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
        for example in corpus:
            example[self.key] = self.label(example["text"])
        if self.key not in corpus[0]:
            raise ArgumentError(
                f"{self.name} attaches a label to each example, but this corpus, a {type(corpus).__name__}, creates its examples "
                "at each access; give a list of examples, for a datasets.Dataset that of from_dataset(dataset, label=None)"
            )

    def head(self, encoder: Encoder) -> nn.Module:
        """Build a linear map to labels."""
        return LinearHead(encoder.width, self.classes)
