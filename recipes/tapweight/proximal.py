"""The coupling of two encoders, gamma ||omega - theta||^2."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["proximal"]


def proximal(encoder: nn.Module, anchor: nn.Module, gamma: float) -> Tensor:
    """Return gamma ||omega - theta||^2 over the trainable parameters that two encoders share by name.

    Its second derivatives are constants, 2 gamma I and -2 gamma I: as a level's regularizer it lets a cotangent be pulled
    back without a pass through a network.

    Args:
        encoder: holds omega.
        anchor: holds theta, an encoder of the same architecture.
        gamma: strength of the coupling.

    Raises:
        ValueError: the encoders share no trainable parameter.
    """
    anchors = {name: parameter for name, parameter in anchor.named_parameters() if parameter.requires_grad}
    pairs = [(p, anchors[name]) for name, p in encoder.named_parameters() if p.requires_grad and name in anchors]
    if not pairs:
        raise ValueError("proximal: the two encoders share no trainable parameter, so nothing couples them")
    differences = torch._foreach_sub([own for own, _ in pairs], [other for _, other in pairs])
    return gamma * torch.stack([difference.square().sum() for difference in differences]).sum()
