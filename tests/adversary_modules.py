"""The modules, optimisers and batches of the drawn problems."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD

__all__ = ["DOUBLED", "Net", "Projected", "Vector", "read", "wrap"]

#: Kinds of batches whose loss doubles the inputs as it changes them.
DOUBLED = ("in_place", "attribute", "item")


class Net(nn.Module):
    """A small network with linear maps in units of their own: of the first, and of the others."""

    def __init__(self, kind: str, activation: str, units: tuple[float, float], frozen: bool) -> None:
        super().__init__()
        self.kind, self.units = kind, units
        scale = units[1]
        wide, affine = (
            kind in ("group_norm", "instance_norm"),
            scale == 1.0 and kind not in ("group_norm", "instance_norm"),
        )
        h = 6 if wide else 1 if kind == "linear" else 3
        self.first = nn.Linear(2, h, bias=not wide)
        names = {
            "gelu": nn.GELU,
            "silu": nn.SiLU,
            "softplus": nn.Softplus,
            "elu": nn.ELU,
            "mish": nn.Mish,
            "tanh": nn.Tanh,
        }
        self.activation = nn.Softmax(dim=-1) if activation == "softmax" else names[activation]()
        norms: dict[str, Callable[[], nn.Module]] = {
            "layer_norm": lambda: nn.LayerNorm(h, elementwise_affine=affine),
            "batch_norm": lambda: nn.BatchNorm1d(h, affine=affine),
            "batch_norm_eval": lambda: nn.BatchNorm1d(h, affine=affine),
            "group_norm": lambda: nn.GroupNorm(2, h, affine=affine),
            "instance_norm": lambda: nn.InstanceNorm1d(2, affine=affine),
            "rms_norm": lambda: nn.RMSNorm(h, elementwise_affine=affine),
        }
        self.norm = norms[kind]() if kind in norms else nn.Identity()
        if kind == "batch_norm_eval":
            self.norm.eval()
            self.norm.running_mean.fill_(0.3)
            self.norm.running_var.fill_(1.7)
        if kind == "shared":
            self.body = nn.Linear(3, 3, bias=False)
            self.again = self.body
        if kind != "linear":
            self.last = nn.Linear(h, 1)
        self.double()
        if kind == "weight_norm":
            nn.utils.parametrizations.weight_norm(self.first)
        if frozen:
            (
                self.first.weight if kind in ("shared", "group_norm", "instance_norm") else self.first.bias
            ).requires_grad_(False)

    def _linear(self, layer: nn.Linear, h: Tensor) -> Tensor:
        unit = self.units[layer is not self.first]
        if unit == 1.0:
            return layer(h)
        return functional.linear(h, layer.weight / unit, None if layer.bias is None else layer.bias / unit)

    def forward(self, inputs: Tensor) -> Tensor:
        h = self._linear(self.first, inputs)
        if self.kind == "linear":
            return h.squeeze(1)
        h = self.norm(h.unflatten(1, (2, -1))).flatten(1) if self.kind == "instance_norm" else self.norm(h)
        h = self.activation(h)
        if self.kind == "shared":
            h = self.activation(self._linear(self.again, self.activation(self._linear(self.body, h))))
        return self._linear(self.last, h).squeeze(1)


class Vector(nn.Module):
    """Three variables, in a vector and a scalar, in a unit of `scale`."""

    def __init__(self, value: Tensor, scale: float = 1.0, frozen: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(scale * value[:2]), nn.Parameter(scale * value[2])
        self.second.requires_grad_(not frozen)
        self.scale = scale

    def forward(self) -> Tensor:
        return torch.cat([self.first, self.second.reshape(1)]) / self.scale


class Projected(SGD):
    """Steps of SGD, then a projection of one variable."""

    def __init__(self, parameters: Any, *, bounds: tuple[float, float], **settings: Any) -> None:
        super().__init__(parameters, **settings)
        self._bounds = bounds

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        with torch.no_grad():
            self.param_groups[0]["params"][0].view(-1)[0].clamp_(*self._bounds)


class Record:
    """A batch with attributes."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels


def wrap(kind: str, inputs: Tensor, labels: Tensor) -> Any:
    """Return a batch of a kind."""
    both = {"inputs": inputs.clone(), "labels": labels.clone()}
    kinds: dict[str, Callable[[], Any]] = {
        "popped": lambda: both,
        "popped_inside": lambda: {"data": [both]},
        "popped_list": lambda: [*both.values()],
        "user_dict": lambda: collections.UserDict(both),
        "attribute": lambda: Record(**both),
        "item": lambda: both,
    }
    return kinds.get(kind, lambda: tuple(both.values()))()


def read(kind: str, batch: Any) -> tuple[Tensor, Tensor]:
    """Return inputs and labels, and change the batch on the way, as its kind does."""
    if kind in ("popped", "user_dict"):
        labels = batch.pop("labels")
        return batch["inputs"], labels
    if kind == "popped_inside":
        labels = batch["data"][0].pop("labels")
        return batch["data"][0]["inputs"], labels
    if kind == "popped_list":
        labels = batch.pop()
        return batch[0], labels
    if kind == "attribute":
        batch.inputs = 2 * batch.inputs
        return batch.inputs, batch.labels
    if kind == "item":
        batch["inputs"] = 2 * batch["inputs"]
        return batch["inputs"], batch["labels"]
    if kind == "in_place":
        batch[0].mul_(2)
    return batch
