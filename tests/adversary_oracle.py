"""Hypergradients of small problems from primitives of torch: fixed points by Newton's method, and loops of optimiser steps.

Nothing of mlopt is used here, and no module of torch: what is tested shares no code with what it is tested against.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import attrs
import torch
from torch import Tensor
from torch.func import grad, jacrev

__all__ = ["Chain", "Rule", "UnsolvedError", "activate", "normalise", "predict"]


class UnsolvedError(Exception):
    """Newton's method does not converge from this start, so there is no reference."""


def activate(name: str, h: Tensor) -> Tensor:
    """Return an activation written in primitives."""
    formulas: dict[str, Callable[[Tensor], Tensor]] = {
        "tanh": lambda h: 2 / (1 + torch.exp(-2 * h)) - 1,
        "gelu": lambda h: h * (1 + torch.erf(h / math.sqrt(2))) / 2,
        "silu": lambda h: h / (1 + torch.exp(-h)),
        "softplus": lambda h: torch.log(1 + torch.exp(h)),
        "elu": lambda h: torch.where(h > 0, h, torch.exp(torch.where(h > 0, 0.0, h)) - 1),
        "mish": lambda h: h * (1 - 2 / ((1 + torch.exp(h)) ** 2 + 1)),
        "softmax": lambda h: torch.exp(h) / torch.exp(h).sum(-1, keepdim=True),
    }
    return formulas[name](h)


def normalise(name: str, h: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """Return a norm (n, H), written in primitives, with the default eps of torch and an affine map if there is one."""
    if name == "layer_norm":
        h = _standardised(h, -1)
    elif name == "batch_norm":
        h = _standardised(h, 0)
    elif name == "batch_norm_eval":
        h = (h - 0.3) / math.sqrt(1.7 + 1e-5)
    elif name == "rms_norm":
        h = h / torch.sqrt((h * h).mean(-1, keepdim=True) + torch.finfo(h.dtype).eps)
    elif name in ("group_norm", "instance_norm"):
        h = _standardised(h.reshape(len(h), 2, -1), -1).reshape(h.shape)
    weight, bias = parameters.get("norm.weight"), parameters.get("norm.bias")
    h = h if weight is None else h * weight
    return h if bias is None else h + bias


def _standardised(h: Tensor, axis: int) -> Tensor:
    centred = h - h.mean(axis, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(axis, keepdim=True) + 1e-5)


def predict(
    kind: str, activation: str, units: Mapping[str, float], parameters: Mapping[str, Tensor], inputs: Tensor
) -> Tensor:
    """Return the outputs (n,) of the network of a kind, at parameters by name, each in a unit."""
    p = {name: value / units[name] for name, value in parameters.items()}
    if kind == "weight_norm":
        size, along = p.pop("first.parametrizations.weight.original0"), p.pop("first.parametrizations.weight.original1")
        p["first.weight"] = size * along / torch.sqrt((along * along).sum(1, keepdim=True))
    h = inputs @ p["first.weight"].T
    h = h + p["first.bias"] if "first.bias" in p else h
    if kind == "linear":
        return h.sum(1)
    h = activate(activation, normalise(kind, h, p))
    if kind == "shared":
        h = activate(activation, h @ p["body.weight"].T)
        h = activate(activation, h @ p["body.weight"].T)
    return (h * p["last.weight"]).sum(1) + p["last.bias"]


@attrs.define(kw_only=True, eq=False)
class Rule:
    """How a level moves: its gradient's sign, and what its optimiser adds.

    Attributes:
        sign: -1 if it is maximised.
        decay: coupled weight decay of each variable, (n,).
        decoupled: decoupled weight decay of each variable, (n,), as in AdamW.
        kind: "sgd", "adam" or "adamw".
        lr, momentum, eps, clip: of the unrolled steps.
        moved: False for a variable whose gradient a hook masks, (n,).
        stepped: False for a variable that the optimiser does not have, (n,).
        free: False for a variable that a projection holds at its start, (n,).
    """

    sign: float
    decay: Tensor
    decoupled: Tensor
    kind: str
    lr: float
    momentum: float
    eps: float
    clip: float | None
    moved: Tensor
    stepped: Tensor
    free: Tensor

    def condition(self, gradient: Tensor, x: Tensor) -> Tensor:
        """Return what is zero where the steps stop.

        AdamW stops where g / (|g| + eps) = -wd x, that is g = -eps wd x / (1 - wd |x|).
        """
        decay = self.decoupled * x
        slack = 1 - (decay * decay + 1e-300).sqrt() if self.kind == "adamw" else torch.ones_like(x)
        gradient = torch.where(self.moved, gradient, 0.0)
        return self.sign * gradient + self.decay * x + self.eps * decay / slack

    def fixed(self, rows: Tensor, x: Tensor, start: Tensor) -> Tensor:
        """Return the rows of the condition, and x - start for the variables that do not move."""
        moved = self.stepped & self.free & (self.moved | (self.decay + self.decoupled > 0))
        return torch.where(moved, rows, x - start)

    def steps(self, gradient: Callable[[Tensor], Tensor], x: Tensor, count: int, bound: tuple[float, float]) -> Tensor:
        """Return the variables after some steps of torch.optim's SGD, Adam or AdamW, from no state."""
        first, second = torch.zeros_like(x), torch.zeros_like(x)
        for t in range(1, count + 1):
            g = torch.where(self.moved & self.stepped, gradient(x), 0.0)
            if self.clip is not None:
                g = g * torch.clamp(self.clip / (torch.sqrt((g * g).sum() + 1e-300) + 1e-6), max=1.0)
            g = self.sign * g + self.decay * x
            if self.kind == "sgd":
                first = g if t == 1 else self.momentum * first + g
                moved = x - self.lr * first
            else:
                first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
                root = torch.sqrt(second / (1 - 0.999**t) + 1e-300)
                moved = x - self.lr * self.decoupled * x - self.lr * (first / (1 - 0.9**t)) / (root + self.eps)
            moved = torch.where(self.free, moved, torch.clamp(moved, *bound))
            x = torch.where(self.stepped, moved, x)
        return x


Objective = Callable[..., Tensor]


@attrs.define(kw_only=True, eq=False)
class Chain:
    """An outer, a middle and an inner level in primitives; without a middle level, b is empty.

    Attributes:
        outer: f(a, b, z).
        middle: m(b, b stopped, a, z), or None.
        inner: g(z, z stopped, a, b).
        rules: of the middle and the inner level, by name.
        a, b, z: the point; `settle` moves b and z to the fixed point.
        nested: True if m depends on z.
    """

    outer: Objective
    middle: Objective | None
    inner: Objective
    rules: Mapping[str, Rule]
    a: Tensor
    b: Tensor
    z: Tensor
    nested: bool

    def settle(self) -> None:
        """Move b and z to where their steps stop."""
        if self.middle is not None and not self.nested:
            self.b = _newton(lambda b: self._middle_rows(b, self.a, None), self.b)
        if not self.nested:
            self.z = _newton(lambda z: self._inner_rows(z, self.a, self.b), self.z)
            return
        start = self.b
        for _ in range(30):
            self.z = _newton(lambda z: self._inner_rows(z, self.a, self.b), self.z)
            follow = self._inner_solution()
            value = self._middle_rows(self.b, self.a, follow, start)
            matrix = jacrev(lambda b, follow=follow: self._middle_rows(b, self.a, follow, start))(self.b)
            step = torch.linalg.solve(matrix, value)
            if float(step.norm()) < 1e-13 * float(self.b.norm()):
                return
            self.b = self.b - step * min(1.0, 0.5 * float(self.b.norm() / step.norm()))
        if not float(step.norm()) < 1e-10 * float(self.b.norm()):
            raise UnsolvedError

    def push(self, level: str) -> Tensor:
        """Return what is zero where a level's steps stop, also for the variables that do not move."""
        if level == "inner":
            gradient, x = grad(self.inner)(self.z, self.z, self.a, self.b), self.z
        else:
            follow, x = self._inner_solution(), self.b
            gradient = grad(self._total_middle)(x, x, self.a, follow)
        return self.rules[level].condition(gradient, x)

    def gradient(self) -> Tensor:
        """Return the hypergradient at the fixed point.

        A chord iteration x <- x - J^-1 F(x, u) from a fixed point at u0 has the right k derivatives at u0 after k steps.
        """
        z_of = self._inner_solution()
        b0 = self.b
        if self.middle is None:
            return grad(lambda a: self.outer(a, b0, z_of(a, b0)))(self.a)
        matrix = jacrev(lambda b: self._middle_rows(b, self.a, z_of, b0))(b0)

        def total(a: Tensor) -> Tensor:
            b = b0 - torch.linalg.solve(matrix, self._middle_rows(b0, a, z_of, b0))
            return self.outer(a, b, z_of(a, b))

        return grad(total)(self.a)

    def unrolled(self, count: int, bounds: Mapping[str, tuple[float, float]]) -> Tensor:
        """Return the derivative of the outer objective after `count` steps of each level from the point."""

        def total(a: Tensor) -> Tensor:
            b = self.b
            if self.middle is not None:
                step = grad(self.middle)
                b = self.rules["middle"].steps(lambda b: step(b, b, a, self.z), b, count, bounds["middle"])
            step = grad(self.inner)
            z = self.rules["inner"].steps(lambda z: step(z, z, a, b), self.z, count, bounds["inner"])
            return self.outer(a, b, z)

        return grad(total)(self.a)

    def _inner_rows(self, z: Tensor, a: Tensor, b: Tensor, start: Tensor | None = None) -> Tensor:
        rows = self.rules["inner"].condition(grad(self.inner)(z, z, a, b), z)
        return self.rules["inner"].fixed(rows, z, self.z if start is None else start)

    def _total_middle(self, b: Tensor, stopped: Tensor, a: Tensor, z_of: Objective | None) -> Tensor:
        assert self.middle is not None
        return self.middle(b, stopped, a, self.z if z_of is None else z_of(a, b))

    def _middle_rows(self, b: Tensor, a: Tensor, z_of: Objective | None, start: Tensor | None = None) -> Tensor:
        z_of = z_of if self.nested else None
        rows = self.rules["middle"].condition(grad(self._total_middle)(b, b, a, z_of), b)
        return self.rules["middle"].fixed(rows, b, self.b if start is None else start)

    def _inner_solution(self) -> Objective:
        """Return z*(a, b) near the fixed point, right to its third derivative there."""
        z0 = self.z
        matrix = jacrev(lambda z: self._inner_rows(z, self.a, self.b, z0))(z0)

        def solution(a: Tensor, b: Tensor) -> Tensor:
            z = z0
            for _ in range(3):
                z = z - torch.linalg.solve(matrix, self._inner_rows(z, a, b, z0))
            return z

        return solution


def _newton(rows: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    x, value = start, rows(start)
    for _ in range(30):
        step = torch.linalg.solve(jacrev(rows)(x), value)
        if float(step.norm()) <= 1e-14 * float(x.norm()):
            return x - step
        share = 1.0
        while float((after := rows(x - share * step)).norm()) > float(value.norm()) and share > 1e-2:
            share /= 2
        x, value = x - share * step, after
    if not float(step.norm()) <= 1e-11 * float(x.norm()):
        raise UnsolvedError
    return x
