"""A level's optimiser and its learning-rate scheduler: made, or checked where the level brings its own."""

from __future__ import annotations

import inspect
from typing import Any

from torch.optim import Optimizer

from ..errors import ProblemError
from ..problem import Level

__all__ = ["make_optimizer", "make_scheduler"]

_OPTIONAL = inspect.Parameter("closure", inspect.Parameter.KEYWORD_ONLY, default=None)


def make_optimizer(level: Level) -> Optimizer:
    """Return the level's optimiser, made of its variables, or the one that it brought.

    Raises:
        ProblemError: there is none, or it does not train exactly the level's variables.
    """
    if level.optimizer is None:
        raise ProblemError(
            f"level {level.name!r}: optimizer=None, and solve steps every level; give one, such as "
            "partial(torch.optim.SGD, lr=0.1)"
        )
    made: Any = level.optimizer
    if not isinstance(made, Optimizer):
        made = made(list(level.parameters))
    if not isinstance(made, Optimizer):
        raise ProblemError(
            f"level {level.name!r}: optimizer returned a {type(made).__name__}; it must take parameters and return a "
            "torch.optim.Optimizer"
        )
    own = {id(variable) for variable in level.parameters}
    held = {id(variable) for group in made.param_groups for variable in group["params"] if variable.requires_grad}
    if not held <= own:
        raise ProblemError(
            f"level {level.name!r}: its optimizer also holds {len(held - own)} tensors that are not the level's variables; "
            "give each level an optimizer of its own"
        )
    if own - held:
        raise ProblemError(
            f"level {level.name!r}: its optimizer leaves out {len(own - held)} of the level's {len(own)} trainable tensors; add "
            "them, or freeze them with requires_grad_(False)"
        )
    if inspect.signature(made.step).parameters.get("closure", _OPTIONAL).default is inspect.Parameter.empty:
        raise ProblemError(
            f"level {level.name!r}: {type(made).__name__} evaluates the loss itself, several times a step, which levels do "
            "not offer; use an optimizer that takes a gradient, such as torch.optim.SGD or Adam"
        )
    return made


def make_scheduler(level: Level, optimizer: Optimizer) -> Any:
    """Return the level's scheduler, or None where it has none.

    Raises:
        ProblemError: what the level gives makes no scheduler.
    """
    if level.scheduler is None:
        return None
    scheduler = level.scheduler(optimizer)
    if not hasattr(scheduler, "step"):
        raise ProblemError(
            f"level {level.name!r}: scheduler returned a {type(scheduler).__name__}; it must take the optimizer and return a "
            "scheduler, such as partial(torch.optim.lr_scheduler.StepLR, step_size=100)"
        )
    return scheduler
