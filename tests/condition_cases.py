"""Problems with levels that a residual defines, linear and not, for several tests."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

import mlopt
from mlopt import Level, Problem

SIZE = 4
F64 = torch.float64


def with_references(function: Callable[..., Any], names: Sequence[str]) -> Callable[..., Any]:
    """Return a function of (module, batch, modules by name) as a loss or a residual that refers to these levels."""

    def referring(module: Any, batch: Any, **others: Any) -> Any:
        return function(module, batch, others)

    kinds = inspect.Parameter
    first = [kinds(name, kinds.POSITIONAL_OR_KEYWORD) for name in ("module", "batch")]
    referring.__signature__ = inspect.Signature([*first, *(kinds(name, kinds.KEYWORD_ONLY) for name in names)])
    return referring


@attrs.frozen
class Linear:
    """A level that solves A x + sum_j B_j x_j + c = 0: by a residual, or with a symmetric A by a loss."""

    name: str
    matrix: Tensor
    couplings: Mapping[str, Tensor]
    constant: Tensor
    by_loss: bool = False

    @classmethod
    def drawn(cls, name: str, references: Sequence[str], generator: torch.Generator, *, by_loss: bool) -> Linear:
        matrix = torch.randn(SIZE, SIZE, generator=generator, dtype=F64)
        matrix = matrix @ matrix.T / SIZE if by_loss else matrix / SIZE**0.5
        couplings = {other: torch.randn(SIZE, SIZE, generator=generator, dtype=F64) for other in references}
        constant = torch.randn(SIZE, generator=generator, dtype=F64)
        return cls(name, matrix + 1.5 * torch.eye(SIZE, dtype=F64), couplings, constant, by_loss)

    def right(self, values: Mapping[str, Tensor]) -> Tensor:
        return self.constant + sum(matrix @ values[name] for name, matrix in self.couplings.items())

    def solution(self, values: Mapping[str, Tensor]) -> Tensor:
        return -torch.linalg.solve(self.matrix, self.right(values))

    def level(self, start: Tensor, **options: Any) -> Level:
        def called(others: Mapping[str, nn.Module]) -> Tensor:
            return self.right({name: module() for name, module in others.items()})

        def loss(module: Any, batch: Any, others: Any) -> Tensor:
            return module() @ (self.matrix @ module()) / 2 + module() @ called(others)

        def residual(module: Any, batch: Any, others: Any) -> Tensor:
            return self.matrix @ module() + called(others)

        kind = {"loss": loss} if self.by_loss else {"residual": residual}
        given = {part: with_references(function, list(self.couplings)) for part, function in kind.items()}
        return Level(self.name, mlopt.variables(start), **given, **options)


@attrs.frozen
class LinearProblem:
    """Linear levels inside an outer one with the loss sum_i <v_i, x_i> + ||x_i||^2 / 2 + ||u||^2 / 2."""

    parts: Sequence[Linear]
    order: Sequence[int]
    outer: Tensor
    targets: Mapping[str, Tensor]

    @classmethod
    def drawn(
        cls, kinds: Sequence[bool], edges: Sequence[Sequence[int]], order: Sequence[int], seed: int
    ) -> LinearProblem:
        """Return a problem of a kind (True for a loss) and the earlier levels that it uses for each level."""
        generator = torch.Generator().manual_seed(seed)
        names = [f"x{k}" for k in range(len(kinds))]
        parts = [
            Linear.drawn(name, ["u", *(names[j] for j in uses)], generator, by_loss=by_loss)
            for name, by_loss, uses in zip(names, kinds, edges, strict=True)
        ]
        outer = torch.randn(SIZE, generator=generator, dtype=F64)
        targets = {name: torch.randn(SIZE, generator=generator, dtype=F64) for name in names}
        return cls(parts, order, outer, targets)

    def value(self, values: Mapping[str, Tensor]) -> Tensor:
        own = values["u"] @ values["u"] / 2
        return own + sum(values[name] @ v + values[name] @ values[name] / 2 for name, v in self.targets.items())

    def solutions(self, outer: Tensor) -> dict[str, Tensor]:
        values = {"u": outer}
        for part in self.parts:
            values[part.name] = part.solution(values)
        return values

    def exact(self) -> Tensor:
        """Return the hypergradient, by a backward pass through the solutions."""
        outer = self.outer.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.value(self.solutions(outer)), outer)
        return gradient

    def problem(self, condition: mlopt.Estimator, loss: mlopt.Estimator) -> Problem:
        solutions = self.solutions(self.outer)

        def outer_loss(module: Any, batch: Any, others: Any) -> Tensor:
            return self.value({"u": module(), **{name: other() for name, other in others.items()}})

        inner = [
            self.parts[k].level(solutions[self.parts[k].name], estimator=loss if self.parts[k].by_loss else condition)
            for k in self.order
        ]
        names = [part.name for part in self.parts]
        return Problem(Level("u", mlopt.variables(self.outer), with_references(outer_loss, names)), *inner)


def equilibrium(
    seed: int = 0, *, estimator: mlopt.Estimator | None = None, size: int = 5, **options: Any
) -> tuple[Problem, Callable[[Tensor], Tensor]]:
    """Return a layer x = tanh(W x + U u + b) with ||W|| < 1 inside an outer level, and its map x -> T(x, u)."""
    generator = torch.Generator().manual_seed(seed)
    weight, mixing = (torch.randn(size, size, generator=generator, dtype=F64) for _ in range(2))
    weight = 0.7 * weight / torch.linalg.matrix_norm(weight, 2)
    bias, target, start = (torch.randn(size, generator=generator, dtype=F64) for _ in range(3))

    def step(x: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(x @ weight.T + u @ mixing.T + bias)

    state = torch.zeros(size, dtype=F64)
    for _ in range(400):
        state = step(state, start)
    problem = Problem(
        Level(
            "u",
            mlopt.variables(start),
            lambda u, batch, *, layer: (layer() - target).square().sum() + u().square().sum(),
        ),
        Level(
            "layer",
            mlopt.variables(state),
            residual=lambda x, batch, *, u: x() - step(x(), u()),
            estimator=estimator or mlopt.GMRES(),
            **options,
        ),
    )

    def unrolled(outer: Tensor) -> Tensor:
        x = torch.zeros(size, dtype=F64)
        for _ in range(400):
            x = step(x, outer)
        return (x - target).square().sum() + outer.square().sum()

    return problem, unrolled
