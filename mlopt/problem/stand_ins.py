"""Modules during an evaluation: clones stand in for buffers, and leaves for variables; modes are restored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from .level import Level
    from .point import Point

__all__ = ["cloned_buffers", "restored_modes", "standing_in"]


@contextlib.contextmanager
def cloned_buffers(modules: Iterable[nn.Module], *, apart: nn.Module | None = None) -> Iterator[None]:
    """Let the modules work on clones of their buffers; restore buffers and modes on exit. Submodules of `apart` keep theirs."""
    with restored_modes(modules) as submodules:
        owners = {id(m): m for m in submodules if m._buffers}
        for own in apart.modules() if apart is not None and owners else ():
            owners.pop(id(own), None)
        kept = [(m, dict(m._buffers)) for m in owners.values()]
        for module, buffers in kept:
            module._buffers.update({name: b if b is None else b.clone() for name, b in buffers.items()})
        try:
            yield
        finally:
            for module, buffers in kept:
                module._buffers.update(buffers)


@contextlib.contextmanager
def restored_modes(modules: Iterable[nn.Module]) -> Iterator[list[nn.Module]]:
    """Yield all submodules, and restore their modes on exit: a loss that calls `eval()` must not decide for other losses."""
    # `nn.Module.modules` forms the names of the submodules too, which takes most of its time.
    pending, seen = list(modules), set[int]()
    modes = []
    for module in pending:  # grows inside
        if id(module) not in seen:
            seen.add(id(module))
            modes.append((module, module.training))
            pending += [m for m in module._modules.values() if m is not None]
    try:
        yield [module for module, _ in modes]
    finally:
        for module, mode in modes:
            if module.training != mode:
                module.training = mode


@contextlib.contextmanager
def standing_in(point: Point, level: Level, leaves: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let other parameters stand in for the variables of a level, in its module and at the point.

    A graph traced inside refers to these leaves, and remains valid when the variables change.
    """
    before = point.values[level.name]
    swapped = {id(variable): leaf for variable, leaf in zip(before, leaves, strict=True)}
    places = [
        (module, name, parameter)
        for module in level.module.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in swapped
    ]
    try:
        point.values[level.name] = tuple(leaves)
        for module, name, parameter in places:
            setattr(module, name, swapped[id(parameter)])  # recurrent layers override setattr to observe it
        yield
    finally:
        point.values[level.name] = before
        for module, name, parameter in places:
            setattr(module, name, parameter)
