"""The state of modules and of what steps them: copied in memory, or as a tree for a checkpoint."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

__all__ = ["Snapshot", "load_module_state", "load_part", "module_state"]


class Snapshot:
    """A copy in memory of trainable parameters and buffers, and of the state of what steps them.

    Args:
        modules: whose trainable parameters and buffers are copied.
        stateful: for each, what it has with `state_dict` and `load_state_dict`, by kind.
        held: dictionaries whose content is to come back.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        stateful: Iterable[Mapping[str, Any]],
        held: Iterable[dict[str, Any]] = (),
    ) -> None:
        parts = list(modules)
        #: Where buffers are held, since a module may bind new ones under their names.
        self._places = [
            (holder, name, buffer)
            for module in parts
            for holder in module.modules()
            for name, buffer in holder._buffers.items()
            if buffer is not None
        ]
        self._live = [p for module in parts for p in _trainable(module)] + [buffer for _, _, buffer in self._places]
        self._kept = [t.detach().clone() for t in self._live]
        self._states = [(part, copy.deepcopy(part.state_dict())) for parts in stateful for part in parts.values()]
        self._extra = [
            (holder, copy.deepcopy(holder.get_extra_state()))
            for module in parts
            for holder in module.modules()
            if type(holder).get_extra_state is not nn.Module.get_extra_state
        ]
        self._held = [(content, dict(content)) for content in held]

    def restore(self) -> None:
        """Put everything back; once."""
        for tensor, kept in zip(self._live, self._kept, strict=True):
            tensor.data.copy_(kept)
        for holder, name, buffer in self._places:
            holder._buffers[name] = buffer
        for holder, state in self._extra:
            holder.set_extra_state(state)
        for part, state in self._states:
            load_part(part, state)
        for live, before in self._held:
            live.clear()
            live.update(before)


def load_part(part: Any, state: Mapping[str, Any]) -> None:
    """Give an optimiser, a scheduler or a loss scaler its state; that of an optimiser to the last bit.

    An optimiser casts what it is given to the dtype of its parameters, also what it keeps in another one (NAdam's product).
    """
    part.load_state_dict(state)
    if isinstance(part, Optimizer):
        parameters = [parameter for group in part.param_groups for parameter in group["params"]]
        for index, kept in state["state"].items():
            own = part.state[parameters[index]]
            for name, value in kept.items():
                if isinstance(value, torch.Tensor) and own[name].dtype != value.dtype:
                    own[name] = value.to(own[name].device)


def _trainable(module: nn.Module) -> list[torch.Tensor]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def module_state(module: nn.Module) -> dict[str, Any]:
    """Return a module's state: also buffers that its `state_dict` leaves out, what is frozen, and which parts are in training."""
    state = module.state_dict()
    return {
        "state": dict(state),
        # Versions of the parts, which some look at on loading.
        "metadata": dict(getattr(state, "_metadata", {})),
        "buffers": {name: b for name, b in module.named_buffers() if name not in state},
        "requires_grad": {name: p.requires_grad for name, p in module.named_parameters()},
        "training": {name: part.training for name, part in module.named_modules()},
    }


def load_module_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Put back what `module_state` returned."""
    tensors = OrderedDict(state["state"])
    tensors._metadata = state["metadata"]  # type: ignore[attr-defined]
    module.load_state_dict(tensors)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(state["requires_grad"][name])
    for name, part in module.named_modules():
        part.training = state["training"][name]
    buffers = dict(module.named_buffers())
    for name, value in state["buffers"].items():
        buffers[name].copy_(value)
