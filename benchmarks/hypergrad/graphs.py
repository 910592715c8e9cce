"""Graphs of quadratic levels in plain torch: ladders of diamonds and chains, with their exact hypergradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .networks import Vector

__all__ = ["Graph", "shape"]

CONDITION = 3.0


def shape(name: str) -> dict[str, tuple[str, ...]]:
    """Return, for "ladder N" or "chain N", the levels that the loss of each level refers to, outermost first.

    A ladder of N diamonds has 2^N paths from the outermost level back to it; a chain has one path through N levels.
    """
    kind, count = name.split()
    n = int(count)
    if kind == "chain":
        # x -> level_1 -> ... -> level_n, whose solution the outermost loss reads.
        inner = {f"level_{i}": (f"level_{i - 1}" if i > 1 else "outer",) for i in range(1, n + 1)}
        return {"outer": (f"level_{n}",), **inner}
    if kind != "ladder":
        raise ValueError(f"shape {name!r}: pass 'ladder N' or 'chain N'")
    references: dict[str, tuple[str, ...]] = {"outer": (f"node_{n}",)}
    for i in reversed(range(n)):
        references |= {
            f"node_{i + 1}": (f"left_{i}", f"right_{i}"),
            f"left_{i}": (f"node_{i}",),
            f"right_{i}": (f"node_{i}",),
        }
    return references | {"node_0": ("outer",)}


class Graph:
    """Levels at their solutions, with losses s^T Q s / 2 + b^T s; s are the variables of a level and of those it refers to.

    The outermost loss reads only the solutions, so the whole hypergradient passes through the levels inside.

    Args:
        references: the references of each level by name, outermost first.
        size: variables of each level.
    """

    def __init__(self, references: Mapping[str, tuple[str, ...]], size: int) -> None:
        self.references, self.size = dict(references), size
        self._forms = {}
        generator = torch.Generator().manual_seed(0)
        for name in self.references:
            n = size * len(self._parts(name))
            basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
            spectrum = CONDITION ** torch.linspace(0, 1, n, dtype=torch.float64)
            slope = torch.randn(n, generator=generator, dtype=torch.float64)
            self._forms[name] = ((basis * spectrum) @ basis.T, slope)
        self.modules: dict[str, nn.Module] = {name: Vector(size).double() for name in self.references}
        start = torch.randn(size, generator=generator, dtype=torch.float64)
        for name, value in self._solutions(start).items():
            self.modules[name].load_state_dict({"value": value})

    def loss(self, name: str, variables: Callable[[str], Tensor]) -> Tensor:
        """Return the loss of a level; `variables` returns the variables of a level by name."""
        form, slope = self._forms[name]
        s = torch.cat([variables(part) for part in self._parts(name)])
        return 0.5 * s @ form @ s + slope @ s

    def _parts(self, name: str) -> tuple[str, ...]:
        return self.references[name] if name == "outer" else (name, *self.references[name])

    def _solutions(self, outer: Tensor) -> dict[str, Tensor]:
        solutions: dict[str, Tensor] = {"outer": outer}
        while len(solutions) < len(self.references):
            for name, others in self.references.items():
                if name not in solutions and all(other in solutions for other in others):
                    form, slope = self._forms[name]
                    own, rest = form[: self.size, : self.size], form[: self.size, self.size :]
                    known = torch.cat([solutions[other] for other in others])
                    solutions[name] = -torch.linalg.solve(own, rest @ known + slope[: self.size])
        return solutions

    def exact(self) -> Tensor:
        """Return the hypergradient: differentiate the closed form of the solutions."""
        outer: Any = self.modules["outer"]
        start = outer.value.detach().clone().requires_grad_()
        solutions = self._solutions(start)
        return torch.autograd.grad(self.loss("outer", solutions.__getitem__), start)[0]
