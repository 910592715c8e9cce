"""The step of SGD in closed form: it is linear in the variables, the gradient and the momenta."""

from __future__ import annotations

from typing import Any

import attrs
import torch

from ..tensors import Tensors, add, axpy, scale, zeros_like

__all__ = ["SGDStep"]


@attrs.frozen(kw_only=True, eq=False)
class SGDStep:
    """torch.optim.SGD's step of some variables, and its transpose.

    With d = s g + w x, the momenta become m' = mu m + (1 - tau) d, or d in the first step of all. Then x' = x - lr e, where e is
    m', d + mu m' (Nesterov), or d if mu = 0.

    Attributes:
        rate: lr.
        momentum: mu.
        dampening: tau.
        decay: w.
        nesterov: True for Nesterov's momentum.
        sign: s, -1.0 to maximise.
        live: True if the momenta are those of an optimiser at work, so that no step is the first of all.
    """

    rate: float
    momentum: float
    dampening: float
    decay: float
    nesterov: bool
    sign: float
    live: bool

    @classmethod
    def of(cls, group: dict[str, Any], *, live: bool) -> SGDStep:
        """Return the step of a group of parameters of torch.optim.SGD."""
        return cls(
            rate=float(group["lr"]),
            momentum=float(group["momentum"]),
            dampening=float(group["dampening"]),
            decay=float(group["weight_decay"]),
            nesterov=bool(group["nesterov"]),
            sign=-1.0 if group["maximize"] else 1.0,
            live=live,
        )

    def __call__(self, number: int, variables: Tensors, gradient: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
        """Return x' and m' after step `number`; the state m is empty if mu = 0."""
        direction = gradient if self.sign == 1.0 else scale(self.sign, gradient)
        if self.decay:
            direction = axpy(self.decay, variables, direction)
        if self.momentum:
            state = add(scale(self.momentum, state), scale(self._share(number), direction))
            direction = axpy(self.momentum, state, direction) if self.nesterov else state
        return axpy(-self.rate, direction, variables), state

    def pull(self, number: int, adjoint: Tensors, memory: Tensors) -> tuple[Tensors, Tensors, Tensors]:
        """Pull cotangents on x' and m' (zero if empty) back to x, g and m."""
        along = scale(-self.rate, adjoint)
        if self.momentum:
            memory = memory or zeros_like(adjoint)
            memory = axpy(self.momentum if self.nesterov else 1.0, along, memory)
            share = scale(self._share(number), memory)
            along = add(along, share) if self.nesterov else share
            memory = scale(self.momentum, memory)
        if self.decay:
            adjoint = axpy(self.decay, along, adjoint)
        return adjoint, along if self.sign == 1.0 else scale(self.sign, along), memory

    def initial(self, variables: Tensors, states: list[dict[str, Any]]) -> Tensors:
        """Return m from the states of the optimiser."""
        if not self.momentum:
            return ()
        return tuple(s["momentum_buffer"] for s in states) if self.live else tuple(map(torch.zeros_like, variables))

    def _share(self, number: int) -> float:
        return 1.0 if number == 0 and not self.live else 1.0 - self.dampening
