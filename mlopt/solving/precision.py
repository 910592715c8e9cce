"""The precision of a level's own steps: autocast, and the scale of the loss that half precision needs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ..problem import Level
from ..tensors import Tensors, scale

__all__ = ["Precision"]

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """How a level's own loss is evaluated, and its gradient kept from vanishing in half precision.

    With "fp16" the loss is multiplied by a scale, the gradient divided by it. A gradient that overflowed is not stepped on,
    and the scale halves; it doubles again after steps without one (Micikevicius et al. 2018, arXiv 1710.03740).

    Args:
        level: the level.

    Attributes:
        autocast: the context in which the level's loss is evaluated; it can be entered again and again.
        scaler: of the loss; None where it is not scaled.
    """

    def __init__(self, level: Level) -> None:
        self._device, dtype = level.device, _TYPES.get(level.precision or "")
        self.scaler = GradScaler(self._device.type) if level.precision == "fp16" else None
        self.autocast: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if dtype is not None:
            self.autocast = torch.autocast(self._device.type, dtype=dtype)

    @property
    def loss_scale(self) -> Tensor | None:
        """The present scale of the loss, on the device; None where there is none."""
        return None if self.scaler is None else self.scaler.scale(torch.ones((), device=self._device))

    def scaled(self, loss: Tensor) -> Tensor:
        """Return the loss times its scale."""
        return loss if self.scaler is None else self.scaler.scale(loss.float())

    def scaled_vectors(self, vectors: Sequence[Tensor]) -> Tensors:
        """Return derivatives of the loss as those of the scaled loss."""
        return tuple(vectors) if self.loss_scale is None else scale(self.loss_scale, vectors)

    def unscaled(self, vectors: Sequence[Tensor]) -> Tensors:
        """Return derivatives of the scaled loss as those of the loss."""
        return tuple(vectors) if self.loss_scale is None else scale(1.0 / self.loss_scale, vectors)

    def unscale(self, optimizer: Optimizer) -> None:
        """Turn the gradient in `.grad` from that of the scaled loss into that of the loss, looking for overflow."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer) -> bool:
        """Step on the gradient; say whether it was fit for it."""
        if self.scaler is None:
            optimizer.step()
            return True
        before = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= before
