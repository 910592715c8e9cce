"""Betty (Choe et al. 2023, arXiv 2207.02849): its release, and the head of its repository."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from torch import Tensor, nn
from torch.optim import SGD

from ..cases import Case
from ..graphs import Graph
from . import flat_or_zero

VERSION = "betty-ml"


class _Problem(ImplicitProblem):
    """A problem whose loss is a function of the problems by name; it has no batch."""

    def __init__(self, name: str, module: nn.Module, loss: Callable[[Any], Tensor], config: Config) -> None:
        super().__init__(name, config, module=module, optimizer=SGD(module.parameters(), lr=1.0))
        self._loss = loss

    def get_batch(self) -> None:
        return None

    def training_step(self, batch: Any) -> Tensor:
        return self._loss(self)


def _engine(problems: list[_Problem], edges: dict[str, Any], device: str) -> Engine:
    logging.disable(logging.CRITICAL)
    return Engine(problems, EngineConfig(strategy="cpu" if device == "cpu" else "gpu"), edges)


def _gradient(outer: _Problem) -> Tensor:
    """Compute a step of the outermost problem, without the optimiser."""
    outer.zero_grad()
    loss, _ = outer.get_loss(None)
    outer.backward(loss, outer.trainable_parameters(), outer.paths, retain_graph=True, allow_unused=True)
    variables = outer.trainable_parameters()
    return flat_or_zero([variable.grad for variable in variables], variables)


def _config(kind: str, iterations: int, step_size: float) -> Config:
    return Config(
        type=kind,
        neumann_iterations=iterations,
        neumann_alpha=step_size,
        cg_iterations=iterations,
        cg_alpha=1.0,
        retain_graph=True,
    )


def _two_levels(kind: str, case: Case, iterations: int) -> Callable[[], Tensor]:
    def inner_loss(problem: Any) -> Tensor:
        return case.inner_loss(problem.module, problem.outer.module, case.data)

    def outer_loss(problem: Any) -> Tensor:
        return case.outer_loss(problem.inner.module, problem.module, case.data)

    outer = _Problem("outer", case.outer, outer_loss, Config(retain_graph=True))
    inner = _Problem("inner", case.inner, inner_loss, _config(kind, iterations, case.step_size))
    _engine([outer, inner], {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}}, str(case.x[0].device.type))
    return partial(_gradient, outer)


def _graph(kind: str, graph: Graph, iterations: int) -> Callable[[], Tensor]:
    def loss(problem: Any) -> Tensor:
        return graph.loss(
            problem.name, lambda name: (problem if name == problem.name else getattr(problem, name)).module()
        )

    problems = {
        name: _Problem(name, module, loss, _config(kind, iterations, step_size=0.5))
        for name, module in graph.modules.items()
    }
    # Edges from the outermost level to the levels that it enters, and from each level to the levels that read its solution.
    outer = problems["outer"]
    entering = [problems[name] for name, others in graph.references.items() if "outer" in others]
    upward = {
        problems[name]: [problems[user] for user, others in graph.references.items() if name in others]
        for name in graph.references
        if name != "outer"
    }
    _engine(list(problems.values()), {"u2l": {outer: entering}, "l2u": upward}, "cpu")
    return partial(_gradient, outer)


ESTIMATORS = {
    "FiniteDifference": partial(_two_levels, "darts"),
    "Neumann": partial(_two_levels, "neumann"),
    "ConjugateGradient": partial(_two_levels, "cg"),
}
GRAPHS = {
    "FiniteDifference": partial(_graph, "darts"),
    "Neumann": partial(_graph, "neumann"),
    "ConjugateGradient": partial(_graph, "cg"),
}
LOOPS = {"ConjugateGradient": ESTIMATORS["ConjugateGradient"], "Neumann": ESTIMATORS["Neumann"]}
