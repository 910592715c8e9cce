"""A warning of an outermost level that does not move in the first steps of a run."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from ..errors import TrustWarning

__all__ = ["Stillness"]

#: Steps whose hypergradients must all be zero. A streamed pullback has none in the first step, and a zero start may need another.
_STEPS = 3


class Stillness:
    """Keeps for the first outer steps of a run whether they could move the variables, without waiting for a device.

    Args:
        name: the outermost level.
        scheduled: whether a scheduler changes its learning rate, which may then start at zero.
    """

    def __init__(self, name: str, *, scheduled: bool) -> None:
        self._name, self._scheduled = name, scheduled
        self._steps = 0
        #: By step, for each gradient, whether an entry is not zero.
        self._moves: list[Tensor] = []
        self._frozen = 0

    def note(self, gradient: Sequence[Tensor], optimizer: Optimizer) -> None:
        """Take note of a hypergradient and the learning rates of a step."""
        if self._steps == _STEPS:
            return
        self._steps += 1
        self._moves += [derivative.any() for derivative in gradient]
        self._frozen += all(isinstance(g.get("lr"), float) and g["lr"] == 0.0 for g in optimizer.param_groups)

    def warn(self) -> None:
        """Warn once, after those steps, if none of them could move the variables."""
        if self._steps < _STEPS or not self._moves:
            return
        zero = not any(bool(moves) for moves in self._moves)
        self._moves = []
        if zero:
            warnings.warn(
                f"the hypergradient of level {self._name!r} was exactly zero in the first {_STEPS} steps. Either no "
                "loss uses its variables (detached values do not count), or an estimator leaves the response of a level out "
                "(scale=0). See check_hypergradient and diagnose",
                TrustWarning,
                stacklevel=2,
            )
        if self._frozen == _STEPS and not self._scheduled:
            warnings.warn(
                f"level {self._name!r} had a learning rate of 0 in the first {_STEPS} steps, so that its variables do not move; "
                "give its optimizer a positive lr",
                TrustWarning,
                stacklevel=2,
            )
