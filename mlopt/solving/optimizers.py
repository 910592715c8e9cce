"""Create the optimiser and the learning-rate scheduler of a level, or check an optimiser that the level provides."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from torch.optim import Optimizer

from ..errors import ProblemError
from ..problem import Level, require_all_variables

__all__ = ["make_optimizer", "make_scheduler"]

_OPTIONAL = inspect.Parameter("closure", inspect.Parameter.KEYWORD_ONLY, default=None)


def make_optimizer(level: Level, *, copied: bool = False) -> Optimizer:
    """Return the optimiser of a level: an instance that the level provides, or the result of its factory.

    Args:
        level: the level.
        copied: whether to return a copy of an instance, with a copy of its state, for the same variables.

    Raises:
        ProblemError: the level has no optimiser, or the optimiser does not train exactly the level's variables.
    """
    if level.optimizer is None:
        raise ProblemError(
            f"level {level.name!r}: optimizer=None, but solve trains every level; give an optimizer, such as "
            "partial(torch.optim.SGD, lr=0.1)"
        )
    optimizer: Any = level.optimizer
    if not isinstance(optimizer, Optimizer):
        optimizer = optimizer(list(level.parameters))
    elif copied:
        shared = {id(variable): variable for group in optimizer.param_groups for variable in group["params"]}
        optimizer = copy.deepcopy(optimizer, shared)
    if not isinstance(optimizer, Optimizer):
        raise ProblemError(
            f"level {level.name!r}: optimizer returned a {type(optimizer).__name__}; it must take parameters and return a "
            "torch.optim.Optimizer"
        )
    require_all_variables(level, optimizer)
    if inspect.signature(optimizer.step).parameters.get("closure", _OPTIONAL).default is inspect.Parameter.empty:
        raise ProblemError(
            f"level {level.name!r}: {type(optimizer).__name__} needs a closure that evaluates the loss, which "
            "solve does not provide; use an optimizer that steps with a gradient, such as torch.optim.SGD or Adam"
        )
    return optimizer


def make_scheduler(level: Level, optimizer: Optimizer) -> Any:
    """Return the learning-rate scheduler of a level, or None.

    Raises:
        ProblemError: the factory of the level does not return a scheduler with a state, which runs restore and save.
    """
    if level.scheduler is None:
        return None
    scheduler = level.scheduler(optimizer)
    if missing := [name for name in ("step", "state_dict", "load_state_dict") if not hasattr(scheduler, name)]:
        raise ProblemError(
            f"level {level.name!r}: scheduler returned a {type(scheduler).__name__} without {', '.join(missing)}; it must take "
            "the optimizer and return a scheduler, such as partial(torch.optim.lr_scheduler.StepLR, step_size=100), or an object "
            "with these methods"
        )
    return scheduler
