"""higher (Grefenstette et al. 2019, arXiv 1910.01727): unrolling only."""

from __future__ import annotations

from collections.abc import Callable

import higher
import torch
from torch import Tensor

from ..cases import Case
from . import flat_or_zero

VERSION = "higher"


def _unrolled(case: Case, iterations: int) -> Callable[[], Tensor]:
    def call() -> Tensor:
        optimizer = torch.optim.SGD(case.x, lr=case.step_size)
        with higher.innerloop_ctx(case.inner, optimizer) as (inner, stepper):
            for _ in range(iterations):
                stepper.step(case.inner_loss(inner, case.outer, case.data))
            gradients = torch.autograd.grad(case.outer_loss(inner, case.outer, case.data), case.u)
        return flat_or_zero(gradients, case.u)

    return call


ESTIMATORS = {"Unrolled": _unrolled}
LOOPS: dict[str, Callable[[Case, int], Callable[[], Tensor]]] = {}
