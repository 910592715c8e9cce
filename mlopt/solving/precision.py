"""The precision of the steps of a level: autocast, and loss scaling for half precision."""

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
    """Evaluates the loss of a level under autocast; with "fp16", scales the loss so that its gradient does not underflow.

    The loss is multiplied by the scale, and the gradient divided by it. If a gradient overflows, the step is skipped and the
    scale is halved; after steps without overflow it is doubled (Micikevicius et al. 2018, arXiv 1710.03740).

    Args:
        level: the level.

    Attributes:
        autocast: the context in which the loss of the level is evaluated; it can be entered repeatedly.
        scaler: scales the loss; None without scaling.
    """

    def __init__(self, level: Level) -> None:
        self._device, dtype = level.device, _TYPES.get(level.precision or "")
        self.scaler = GradScaler(self._device.type) if level.precision == "fp16" else None
        self.autocast: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if dtype is not None:
            self.autocast = torch.autocast(self._device.type, dtype=dtype)

    @property
    def loss_scale(self) -> Tensor | None:
        """The current scale of the loss, on the device; None without scaling."""
        return None if self.scaler is None else self.scaler.scale(torch.ones((), device=self._device))

    def scaled(self, loss: Tensor) -> Tensor:
        """Return the scaled loss."""
        return loss if self.scaler is None else self.scaler.scale(loss.float())

    def scaled_vectors(self, vectors: Sequence[Tensor]) -> Tensors:
        """Return derivatives of the scaled loss, given derivatives of the loss."""
        return tuple(vectors) if self.loss_scale is None else scale(self.loss_scale, vectors)

    def unscaled(self, vectors: Sequence[Tensor]) -> Tensors:
        """Return derivatives of the loss, given derivatives of the scaled loss."""
        return tuple(vectors) if self.loss_scale is None else scale(1.0 / self.loss_scale, vectors)

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients in `.grad` by the scale, and record overflow."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer) -> bool:
        """Take a step with the gradients in `.grad`; return False if it was skipped because of overflow."""
        if self.scaler is None:
            optimizer.step()
            return True
        before = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= before
