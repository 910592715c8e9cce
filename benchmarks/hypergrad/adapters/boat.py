"""BOAT (Liu et al. 2024).

Its operators are called directly: `Problem.run_iter` would first take a step of the inner level, which changes the point, and
write a log file, which costs time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import higher
import torch
from boat_torch.gm_ol import makes_functional_dynamical_system
from boat_torch.na_ol import makes_functional_na_operation
from torch import Tensor

from ..cases import Case
from . import flat_or_zero

VERSION = "boat-torch"


def _operator(name: str, case: Case, iterations: int) -> Callable[[], Tensor]:
    # Its finite difference approximates the inverse Hessian by the inner learning rate times the identity.
    optimizer = torch.optim.SGD(case.x, lr=1.0 if name == "FD" else case.step_size)

    def lower(feed: Any, outer: Any, inner: Any, params: Any = None) -> Tensor:
        return case.inner_loss(inner, outer, case.data)

    def upper(feed: Any, outer: Any, inner: Any, params: Any = None) -> Tensor:
        return case.outer_loss(inner, outer, case.data)

    config = {
        "gm_op": ["NGD"],
        "na_op": [name],
        "lower_level_opt": optimizer,
        "CG": {"tolerance": 0.0, "k": iterations},
        "FD": {"r": 1e-2},
        "RGT": {"truncate_iter": 0},
        "GDA": {"alpha_init": 0.0, "alpha_decay": 0.9},
    }
    losses = {"ll_objective": lower, "ul_objective": upper, "ll_model": case.inner, "ul_model": case.outer}
    operator = makes_functional_na_operation([name], **losses, ll_var=case.x, ul_var=case.u, solver_config=config)
    unroll = makes_functional_dynamical_system(["NGD"], **losses, lower_loop=iterations, solver_config=config)

    def call() -> Tensor:
        for variable in case.u:
            variable.grad = None
        feeds: dict[str, Any] = {"ll_feed_dict": {}, "ul_feed_dict": {}}
        with higher.innerloop_ctx(
            case.inner, optimizer, copy_initial_weights=False, track_higher_grads=name == "RAD"
        ) as (inner, stepper):
            if name == "RAD":
                unroll.optimize(**feeds, auxiliary_model=inner, auxiliary_opt=stepper, current_iter=0)
            operator.compute_gradients(**feeds, auxiliary_model=inner, max_loss_iter=0)
        return flat_or_zero([variable.grad for variable in case.u], case.u)

    return call


ESTIMATORS = {
    "ConjugateGradient": partial(_operator, "CG"),
    "Neumann": partial(_operator, "NS"),
    "FiniteDifference": partial(_operator, "FD"),
    "Unrolled": partial(_operator, "RAD"),
}
LOOPS = {"ConjugateGradient": ESTIMATORS["ConjugateGradient"], "Neumann": ESTIMATORS["Neumann"]}
