"""Many tasks at once: a module with a copy of its parameters for each task, and the sum of a loss over the tasks."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..errors import ProblemError
from ..validation import is_whole, require
from .losses import Mixture

__all__ = ["Stacked", "over_tasks", "stacked"]

#: Entries of a batch that are the same for all tasks.
_SHARED = (bool, int, float, str, type(None))


class Stacked(nn.Module):
    """Copies of a module, one for each task: every parameter has a leading dimension over the tasks.

    Losses of one task read it through `over_tasks`. Buffers are shared by the tasks.

    Args:
        module: the module of one task; it is copied.
        copies: T, the number of tasks.

    Attributes:
        module: a module of the same kind, whose parameters have shape (T, ...).
        copies: T.

    Raises:
        ArgumentError: `copies` is not a whole number >= 1.
        ProblemError: the module has running statistics, in train mode.

    Example:
        >>> mlopt.Stacked(torch.nn.Linear(3, 1), copies=5).module.weight.shape
        torch.Size([5, 1, 3])
    """

    def __init__(self, module: nn.Module, copies: int) -> None:
        super().__init__()
        require("stacked", "copies", copies, is_whole(copies, 1), "a whole number >= 1")
        _refuse_running_statistics([module])
        self.copies = copies
        self.module = copy.deepcopy(module)
        _replace(self.module, lambda p: p.expand(copies, *p.shape))

    def forward(self, *arguments: Any, **options: Any) -> Any:
        raise ProblemError(
            f"a stacked {type(self.module).__name__} has {self.copies} copies and cannot be called as one; wrap the loss of one "
            "task in mlopt.over_tasks, or take the module of one task, stacked.task(k)"
        )

    def task(self, number: int) -> nn.Module:
        """Return a copy of the module of one task.

        Args:
            number: the task, from 0 to T - 1.
        """
        return _replace(copy.deepcopy(self.module), lambda p: p[number])


def stacked(module: nn.Module, copies: int) -> Stacked:
    """Return the variables of a level over T tasks: T copies of a module, which start equal.

    Args:
        module: the module of one task; it is copied.
        copies: T.

    Returns:
        A module whose parameters have a leading dimension over the tasks.

    Raises:
        ArgumentError: `copies` is not a whole number >= 1.
        ProblemError: the module has running statistics, in train mode; tasks would write to the same.

    Example:
        >>> mlopt.stacked(torch.nn.Linear(3, 1), copies=5).task(2)
        Linear(in_features=3, out_features=1, bias=True)
    """
    return Stacked(module, copies)


def over_tasks(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a loss of one task into the loss of a level over tasks: F(x_1, ..., x_T, u) = sum_t f(x_t, u; batch_t).

    The levels with stacked modules have one module for each task, other levels are shared by all. Each tensor of the batch has
    a leading dimension T, and each task receives its entry. A sum, in place of a mean, leaves the gradient of a task as
    it is alone: its steps, and the solution of its linear system, do not depend on the number of tasks. Random numbers
    differ from task to task. Logged values are means over the tasks.

    Args:
        loss: takes the module of one task, a batch of one task, and other levels as keyword-only parameters, and returns a
            scalar, or a mapping with `loss` and scalars to log. A regularizer, which takes no batch, is one, too.

    Returns:
        A loss of the same signature, for `Level(loss=...)` or `Level(regularizer=...)`.

    Raises:
        ProblemError: at an evaluation: no level is stacked, numbers of tasks differ, a tensor of the batch has no entry for each
            task, the loss is a `Mixture` or not a scalar, or a module has running statistics, in train mode.

    Source: `torch.func.vmap`; tasks as copies of a level, Finn et al. 2017 (arXiv 1703.03400).

    Example:
        >>> @mlopt.over_tasks
        ... def loss(line, batch):
        ...     return line(batch).square().sum()
        >>> lines = mlopt.stacked(torch.nn.Linear(3, 1), copies=2)
        >>> loss(lines, torch.ones(2, 7, 3)).shape
        torch.Size([])
    """

    @functools.wraps(loss)
    def summed(module: nn.Module, *batch: Any, **others: nn.Module) -> Any:
        modules = (module, *others.values())
        copies = _copies(modules)
        leaves, structure = tree_flatten(batch)
        mapped = [k for k, leaf in enumerate(leaves) if _is_mapped(leaf, copies)]
        holder = _Holder(modules)

        def one(parameters: dict[str, Tensor], entries: list[Tensor]) -> Any:
            own = list(leaves)
            for k, entry in zip(mapped, entries, strict=True):
                own[k] = entry

            def evaluate(module: nn.Module, *rest: nn.Module) -> Any:
                return _read(loss(module, *tree_unflatten(own, structure), **dict(zip(others, rest, strict=True))))

            return functional_call(holder, parameters, (evaluate,))

        try:
            values = torch.func.vmap(one, randomness="different")(holder.stacked, [leaves[k] for k in mapped])
        except RuntimeError:
            _refuse_running_statistics(modules)
            raise
        if isinstance(values, Tensor):
            return values.sum()
        return {key: value.sum() if key == "loss" else value.mean() for key, value in values.items()}

    summed.over_tasks = True  # type: ignore[attr-defined]
    return summed


class _Holder(nn.Module):
    """Calls a function with modules; `stacked` are the parameters, by their name here, that differ between tasks."""

    def __init__(self, modules: tuple[nn.Module, ...]) -> None:
        super().__init__()
        self.held = nn.ModuleList(m.module if isinstance(m, Stacked) else m for m in modules)
        self.stacked: dict[str, Tensor] = {
            f"held.{k}.{name}": parameter
            for k, module in enumerate(modules)
            if isinstance(module, Stacked)
            for name, parameter in module.module.named_parameters()
        }

    def forward(self, function: Callable[..., Any]) -> Any:
        return function(*self.held)


def _copies(modules: tuple[nn.Module, ...]) -> int:
    copies = sorted({module.copies for module in modules if isinstance(module, Stacked)})
    if len(copies) != 1:
        raise ProblemError(
            f"over_tasks: its levels have {' and '.join(map(str, copies))} tasks; give all the same number of copies"
            if copies
            else "over_tasks: no level that the loss takes is stacked; give one the module mlopt.stacked(module, copies=T)"
        )
    return copies[0]


def _is_mapped(leaf: Any, copies: int) -> bool:
    """Return True if an entry of the batch differs between tasks.

    Raises:
        ProblemError: it is a tensor without an entry for each task, or an object that cannot be cut into tasks.
    """
    if isinstance(leaf, Tensor):
        if leaf.dim() and len(leaf) == copies:
            return True
        raise ProblemError(
            f"over_tasks: the batch has a tensor of shape {tuple(leaf.shape)}, whose first dimension must be that of the "
            f"{copies} tasks; expand a tensor that tasks share"
        )
    if isinstance(leaf, _SHARED):
        return False
    raise ProblemError(
        f"over_tasks: the batch holds a {type(leaf).__name__}, which cannot be cut into tasks; give tensors, in lists, tuples "
        "and dictionaries"
    )


def _read(value: Any) -> Any:
    """Return the value of the loss of one task as tensors of shape ()."""
    if isinstance(value, Mixture):
        raise ProblemError(
            "over_tasks: the loss of a task is a Mixture, whose weights would differ by task; return a sum"
        )
    if isinstance(value, Mapping):
        return {key: _scalar(key, torch.as_tensor(entry)) for key, entry in value.items()}
    return _scalar("loss", value)


def _scalar(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = f"has shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"is a {type(value).__name__}"
        raise ProblemError(f"over_tasks: {name!r} of one task {shape}; it must be a scalar tensor: take its mean")
    return value.reshape(())


def _replace(module: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """Replace the parameters of a module in place; tied ones remain tied."""
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(change(parameter.detach()).clone(), parameter.requires_grad)
                setattr(part, name, made[id(parameter)])  # recurrent layers override setattr to observe it
    return module


def _refuse_running_statistics(modules: Any) -> None:
    """Raise if a module in train mode has running statistics, as BatchNorm: each task would write its own to one buffer."""
    for module in modules:
        for name, part in module.named_modules():
            if part.training and getattr(part, "track_running_stats", False):
                raise ProblemError(
                    f"{type(part).__name__} {name!r} has running statistics, to which all tasks would write; use GroupNorm or "
                    f"LayerNorm, or {type(part).__name__}(track_running_stats=False), or call its eval() if the statistics stay"
                )
