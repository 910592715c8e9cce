"""A function of modules as a pure function of their parameters and buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["PureFunction", "key_of"]


class PureFunction(nn.Module):
    """A function of modules as a pure function of their parameters, by torch.func.functional_call on a module that holds them."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.levels = nn.ModuleDict({key_of(name): module for name, module in modules.items()})
        self._names = tuple(modules)
        places: dict[int, list[str]] = {}
        names: dict[str, int] = {}
        seen = set()
        for path, module in self.named_modules(remove_duplicate=False):
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is None:
                    continue
                names[f"{path}.{name}"] = id(tensor)
                if module not in seen:
                    places.setdefault(id(tensor), []).append(f"{path}.{name}")
            seen.add(module)
        #: By name of a tensor, its places: each module once, under its first path. On exit, functional_call would otherwise
        #: put its own tensors into a module that it finds under a second path.
        self._places = {name: places[key] for name, key in names.items()}

    def forward(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        return function({name: self.levels[key_of(name)] for name in self._names}, *arguments)

    def at(self, function: Callable[..., Tensor], parameters: Mapping[str, Tensor], *arguments: Any) -> Tensor:
        """Return the function of the modules, and of further arguments, at other parameters and buffers."""
        # Buffers are cloned inside the transform, which then owns the clone: BatchNorm counts in place.
        buffers = {name: parameters.get(name, buffer).clone() for name, buffer in self.named_buffers()}
        given = {**parameters, **buffers}
        placed = {place: tensor for name, tensor in given.items() for place in self._places.get(name, (name,))}
        result: Tensor = functional_call(self, placed, (function, *arguments), tie_weights=False)
        return result


def key_of(name: str) -> str:
    """Return the key of a level in a ModuleDict, which refuses the names of its own attributes."""
    return f"level_{name}"
