"""Random labels: a control that carries no language."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.functional import cross_entropy

from ...objective import Objective, hashed_label
from ..heads import LinearHead

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from ...encoder import Encoder
    from ..batches import Batch, Example


class RandomLabels(Objective):
    """Cross entropy of labels that are a hash of the text: a control, which can only be learned by heart.

    A method that weighs objectives should give this one less than its equal share.

    Args:
        classes: the number of labels.
    """

    name = "random_labels"

    def __init__(self, classes: int = 8) -> None:
        if classes < 2:
            raise ValueError(f"classes must be at least 2; got {classes!r}")
        self.classes = classes
        self.key = f"random_labels_{classes}"

    def prepare(self, corpus: Sequence[Example], seed: int) -> None:
        """Attach a label from the BLAKE2 hash of its text to each example. The labels do not depend on the seed.

        Raises:
            ValueError: the corpus does not keep what is attached to its examples.
        """
        for example in corpus:
            example[self.key] = hashed_label(example["text"], self.classes)
        if self.key not in corpus[0]:
            raise ValueError(
                f"{self.name} attaches a label to each example, but this corpus, a {type(corpus).__name__}, makes its examples "
                "anew each time; give a list of them, of a datasets.Dataset by from_dataset(dataset, label=None)"
            )

    def head(self, encoder: Encoder) -> nn.Module:
        """Build a linear map to labels."""
        return LinearHead(encoder.width, self.classes)

    def loss(self, encoder: Encoder, head: nn.Module, view: Batch) -> Tensor:
        """Return the mean over the texts."""
        return cross_entropy(head(encoder.pool(view)), view[self.key])
