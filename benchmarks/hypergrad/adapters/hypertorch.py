"""hypertorch (Grazzi et al. 2020, arXiv 2006.16218), imported as `hypergrad`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import hypergrad
import torch
from torch import Tensor

from ..cases import Case
from . import flat_or_zero

VERSION = "hypergrad"


def _step(case: Case, x: list[Tensor], u: list[Tensor]) -> list[Tensor]:
    slopes = torch.autograd.grad(case.f_of(x, u), x, create_graph=True)
    return [variable - case.step_size * slope for variable, slope in zip(x, slopes, strict=True)]


def _implicit(method: Callable[..., Any], case: Case, iterations: int) -> Callable[[], Tensor]:
    def call() -> Tensor:
        gradients = method(case.x, case.u, iterations, partial(_step, case), case.F_of, tol=0.0, set_grad=False)
        return flat_or_zero(gradients, case.u)

    return call


def _warm(case: Case, iterations: int) -> Callable[[], Tensor]:
    """Stochastic AID, warm-started at the solution of the previous call: gradient steps on the linear system."""
    kept: list[list[Tensor] | None] = [None]

    def call() -> Tensor:
        gradients, kept[0] = hypergrad.stoch_AID(
            case.x,
            case.u,
            case.F_of,
            K=iterations,
            fp_map=partial(_step, case),
            linsys_start=kept[0],
            set_grad=False,
            verbose=False,
        )
        return flat_or_zero(gradients, case.u)

    return call


def _unrolled(case: Case, iterations: int) -> Callable[[], Tensor]:
    """Reverse mode that keeps the iterates and recomputes each step."""

    def call() -> Tensor:
        history = [[variable.detach() for variable in case.x]]
        for _ in range(iterations):
            slopes = torch.autograd.grad(case.f_of(*_live(history[-1]), case.u), history[-1])
            history.append([v.detach() - case.step_size * s for v, s in zip(history[-1], slopes, strict=True)])
        gradients = hypergrad.reverse(history, case.u, [partial(_step, case)] * iterations, case.F_of, set_grad=False)
        return flat_or_zero(gradients, case.u)

    return call


def _live(x: list[Tensor]) -> tuple[list[Tensor]]:
    return ([variable.requires_grad_() for variable in x],)


ESTIMATORS = {
    "ConjugateGradient": partial(_implicit, hypergrad.CG),
    "ConjugateGradient normal equations": partial(_implicit, hypergrad.CG_normaleq),
    "Neumann": partial(_implicit, hypergrad.neumann),
    "FixedPoint": partial(_implicit, hypergrad.fixed_point),
    "Unrolled recomputing": _unrolled,
}
LOOPS = {"ConjugateGradient": ESTIMATORS["ConjugateGradient"], "Neumann": ESTIMATORS["Neumann"], "AID warm": _warm}
