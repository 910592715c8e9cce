"""The state of modules, optimisers, schedulers and loss scalers: copied in memory, or returned as a tree for a checkpoint."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..shards import any_sharded, is_sharded, reshard, sharded_as

__all__ = ["Snapshot", "load_module_state", "load_state", "module_state"]


class Snapshot:
    """A copy in memory of trainable parameters, buffers, and other state.

    Args:
        modules: copy their trainable parameters, buffers and extra state.
        stateful: for each module, its optimiser and so on, which have `state_dict` and `load_state_dict`, by name.
        dictionaries: copy their entries.
        variables: False to leave out the trainable parameters.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        stateful: Iterable[Mapping[str, Any]] = (),
        dictionaries: Iterable[dict[str, Any]] = (),
        *,
        variables: bool = True,
    ) -> None:
        copied = list(modules)
        reshard(copied)
        owners = [owner for module in copied for owner in module.modules()]
        parameters = [p for module in copied for p in _trainable(module)] if variables else []
        buffers = [buffer for owner in owners for buffer in owner._buffers.values() if buffer is not None]
        self._live = [*parameters, *buffers]
        self._copies = [t.detach().clone() for t in self._live]
        self._states = [(part, copy.deepcopy(part.state_dict())) for parts in stateful for part in parts.values()]
        self._extra_states = [
            (owner, copy.deepcopy(owner.get_extra_state()))
            for owner in owners
            if type(owner).get_extra_state is not nn.Module.get_extra_state
        ]
        # A module may bind new tensors to the names of its buffers, also where there was none.
        bound: list[dict[str, Any]] = [*dictionaries, *(owner._buffers for owner in owners)]
        self._dictionaries = [(dictionary, dict(dictionary)) for dictionary in bound]

    def restore(self) -> None:
        """Restore everything that was copied; call this at most once."""
        for tensor, saved in zip(self._live, self._copies, strict=True):
            tensor.data.copy_(saved)
        for live, entries in self._dictionaries:
            live.clear()
            live.update(entries)
        for owner, state in self._extra_states:
            owner.set_extra_state(state)
        for part, state in self._states:
            load_state(part, state)


def load_state(part: Any, state: Mapping[str, Any]) -> None:
    """Load the state of an optimiser, a scheduler or a loss scaler, bit for bit.

    `Optimizer.load_state_dict` casts state to the dtype of the parameters, although some optimisers keep state in another dtype
    (`mu_product` of NAdam).
    """
    if not isinstance(part, Optimizer):
        part.load_state_dict(state)
        return
    parameters = [parameter for group in part.param_groups for parameter in group["params"]]
    if any_sharded(parameters):
        state = {**state, "state": {k: _spread(saved, parameters[k]) for k, saved in state["state"].items()}}
    part.load_state_dict(dict(state))
    for index, saved in state["state"].items():
        loaded = part.state[parameters[index]]
        for name, value in saved.items():
            if isinstance(value, torch.Tensor) and loaded[name].dtype != value.dtype:
                loaded[name] = value.to(loaded[name].device)


def _spread(state: Mapping[str, Any], parameter: torch.Tensor) -> dict[str, Any]:
    """Return the state of an optimiser for one parameter, with its tensors sharded as the parameter is."""
    return {
        name: sharded_as(value, parameter, dtype=value.dtype)
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape
        else value
        for name, value in state.items()
    }


def _trainable(module: nn.Module) -> list[torch.Tensor]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def module_state(module: nn.Module) -> dict[str, Any]:
    """Return the state of a module, with the buffers that `state_dict` omits, frozen parameters, and train or eval mode."""
    state = module.state_dict()
    return {
        "state": dict(state),
        # Versions of the submodules, which some read in `load_state_dict`.
        "metadata": dict(getattr(state, "_metadata", {})),
        "buffers": {name: b for name, b in module.named_buffers() if name not in state},
        "requires_grad": {name: p.requires_grad for name, p in module.named_parameters()},
        "training": {name: part.training for name, part in module.named_modules()},
    }


def load_module_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Load a state that `module_state` returned."""
    present = module.state_dict()
    tensors = OrderedDict(
        (name, sharded_as(value, present[name]) if is_sharded(present.get(name)) else value)
        for name, value in state["state"].items()
    )
    tensors._metadata = state["metadata"]  # type: ignore[attr-defined]
    _bind_buffers(module, {**state["state"], **state["buffers"]})
    module.load_state_dict(tensors)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(state["requires_grad"][name])
    for name, part in module.named_modules():
        part.training = state["training"][name]
    buffers = dict(module.named_buffers())
    for name, value in state["buffers"].items():
        buffers[name].copy_(value)


def _bind_buffers(module: nn.Module, saved: Mapping[str, torch.Tensor]) -> None:
    """Bind tensors to buffers that are None in a new module, and were filled in the run of the checkpoint."""
    for place, owner in module.named_modules():
        for name, buffer in owner._buffers.items():
            value = saved.get(f"{place}.{name}" if place else name)
            if buffer is None and value is not None:
                owner._buffers[name] = torch.empty_like(value, device=next(module.parameters()).device)
