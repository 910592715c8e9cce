"""TorchOpt (Ren et al. 2023, arXiv 2211.06934)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torchopt
from torch import Tensor
from torchopt.diff.implicit import custom_root
from torchopt.linear_solve import solve_cg, solve_inv, solve_normal_cg

from ..cases import Case
from . import flat_or_zero

VERSION = "torchopt"


def _root(make: Callable[[Case, int], Any], case: Case, iterations: int) -> Callable[[], Tensor]:
    """Implicit differentiation of a given solution: the solver returns the current point."""

    def stationarity(x: tuple[Tensor, ...], u: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.func.grad(lambda moved: case.f_of(moved, u))(x)

    @custom_root(stationarity, argnums=1, solve=make(case, iterations))
    def solution(x: tuple[Tensor, ...], u: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return x

    def call() -> Tensor:
        u = tuple(case.u)
        x = solution(tuple(variable.detach().requires_grad_() for variable in case.x), u)
        return flat_or_zero(torch.autograd.grad(case.F_of(x, u), u, allow_unused=True), u)

    return call


def _unrolled(case: Case, iterations: int) -> Callable[[], Tensor]:
    def call() -> Tensor:
        before = torchopt.extract_state_dict(case.inner, by="reference")
        optimizer = torchopt.MetaSGD(case.inner, lr=case.step_size)
        for _ in range(iterations):
            optimizer.step(case.f())
        gradients = torch.autograd.grad(case.F(), case.u)
        torchopt.recover_state_dict(case.inner, before)
        return flat_or_zero(gradients, case.u)

    return call


ESTIMATORS = {
    "ConjugateGradient": partial(_root, lambda case, k: solve_cg(maxiter=k, rtol=0.0)),
    "ConjugateGradient normal equations": partial(_root, lambda case, k: solve_normal_cg(maxiter=k, rtol=0.0)),
    "Neumann": partial(_root, lambda case, k: solve_inv(ns=True, maxiter=k, alpha=case.step_size)),
    "Unrolled": _unrolled,
}
LOOPS = {"ConjugateGradient": ESTIMATORS["ConjugateGradient"], "Neumann": ESTIMATORS["Neumann"]}
