"""The coupling of two encoders, by default gamma ||omega - theta||^2."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import l1_loss, mse_loss

from mlopt.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor

    from ..encoder import Encoder

__all__ = ["DISTANCES", "Proximal"]

#: Distances of two tensors by name: the squared Euclidean distance, and the sum of the absolute differences.
DISTANCES = {"l2": mse_loss, "l1": l1_loss}


class Proximal:
    """gamma ||omega - theta||^2 over the trainable parameters that two encoders share by name.

    Its second derivatives are constants, 2 gamma I and -2 gamma I: as a level's regularizer it lets a cotangent be pulled
    back without a pass through a network. Those of the distance "l1" are zero almost everywhere.

    Args:
        encoder: an encoder of the architecture that both have.
        gamma: strength of the coupling.
        distance: a key of `DISTANCES`.

    Raises:
        ValueError: the encoder has no trainable parameter.
    """

    def __init__(self, encoder: Encoder, gamma: float, distance: str = "l2") -> None:
        self.gamma, self._distance = gamma, DISTANCES[distance]
        # Read once: within the transforms of torch.func, `requires_grad` is False for every parameter.
        self._names = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
        if not self._names:
            raise ArgumentError(
                "Proximal: the encoder has no trainable parameter, so nothing couples the two; unfreeze some"
            )

    def __call__(self, encoder: Encoder, anchor: Encoder) -> Tensor:
        """Return the coupling of omega, held by `encoder`, and theta, held by `anchor`; a scalar."""
        own, other = dict(encoder.named_parameters()), dict(anchor.named_parameters())
        distances = [self._distance(own[name], other[name], reduction="sum") for name in self._names]
        return self.gamma * torch.stack(distances).sum()
