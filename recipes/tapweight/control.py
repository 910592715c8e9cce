"""The control: labels by hash, which can only be memorised."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.functional import cross_entropy

from mlopt.errors import ArgumentError

from .objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from .encoder import Encoder

__all__ = ["HashedLabels"]


class HashedLabels(Objective):
    """Cross entropy of labels that are a hash of the example. A modality defines `prepare`.

    A method that weighs objectives should give this one less than its equal share.

    Args:
        classes: the number of labels.

    Attributes:
        key: the entry of an example, and of a batch, that holds the labels.

    Raises:
        ValueError: fewer than two classes.
    """

    name = "random_labels"

    def __init__(self, classes: int = 8) -> None:
        if classes < 2:
            raise ArgumentError(f"classes must be at least 2; got {classes!r}")
        self.classes = classes
        self.key = f"random_labels_{classes}"

    def label(self, text: str) -> int:
        """Return the label of a text, from its BLAKE2 hash. It does not depend on a seed."""
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % self.classes

    def head(self, encoder: Encoder) -> nn.Module:
        """Build a linear map to labels."""
        return nn.Linear(encoder.width, self.classes)

    def loss(self, encoder: Encoder, head: nn.Module, view: Any) -> Tensor:
        """Return the mean over the examples."""
        return cross_entropy(head(encoder.pool(view)), view[self.key])
