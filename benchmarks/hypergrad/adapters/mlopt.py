"""mlopt."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

import mlopt
from mlopt import testing

from ..cases import Case, flat
from ..graphs import Graph
from . import OUTER_RATE, Unsupported, watched

VERSION = "mlopt-torch"
SPELLING = {"forward": "forward", "finite_difference": "differences", "gauss_newton": "Gauss-Newton"}


def problem(case: Case, estimator: Any, watch: Callable[[], None] | None = None) -> mlopt.Problem:
    """Return a case as a problem; `watch` is called before each outer step."""

    def inner_loss(x: nn.Module, batch: Any, *, outer: nn.Module) -> Tensor:
        return case.inner_loss(x, outer, case.data)

    def outer_loss(u: nn.Module, batch: Any, *, inner: nn.Module) -> Tensor:
        return case.outer_loss(inner, u, case.data)

    adam = Adam if watch is None else watched(Adam, watch)
    return mlopt.Problem(
        mlopt.Level("outer", case.outer, outer_loss, optimizer=partial(adam, lr=OUTER_RATE)),
        mlopt.Level("inner", case.inner, inner_loss, optimizer=partial(SGD, lr=case.step_size), estimator=estimator),
    )


def _hypergradient(make: Callable[[Case, int], Any], case: Case, iterations: int) -> Callable[[], Tensor]:
    try:
        made = problem(case, make(case, iterations))
        mlopt.hypergradient(made)
    except mlopt.MloptError as error:
        raise Unsupported(f"refused: {error}") from error
    return lambda: flat(list(mlopt.hypergradient(made).gradient.values()))


def _converged(case: Case) -> dict[str, Any]:
    return {"iterations": 5_000, "rtol": 1e-12 if case.x[0].dtype == torch.float64 else 1e-6}


#: One line for each solver.
_TABLE: dict[str, Callable[..., Any]] = {
    "Identity": lambda case, k, **how: mlopt.Identity(**how),
    "Neumann": lambda case, k, **how: mlopt.Neumann(iterations=k, step_size=case.step_size, **how),
    "ConjugateGradient": lambda case, k, **how: mlopt.ConjugateGradient(iterations=k, rtol=0.0, **how),
    "MINRES": lambda case, k, **how: mlopt.MINRES(iterations=k, rtol=0.0, **how),
    "Nystrom": lambda case, k, **how: mlopt.Nystrom(rank=k, **how),
}
#: Those of them that are measured with compiled products too.
COMPILED = ("Identity", "Neumann", "ConjugateGradient")
_PLAIN: dict[str, Callable[[Case, int], Any]] = {
    "FiniteDifference": lambda case, k: mlopt.FiniteDifference(),
    "Dense": lambda case, k: mlopt.Dense(),
    "Converged ConjugateGradient": lambda case, k: mlopt.ConjugateGradient(**_converged(case)),
    "Converged MINRES": lambda case, k: mlopt.MINRES(**_converged(case)),
    "ValueFunction": lambda case, k: mlopt.ValueFunction(steps=k, step_size=case.step_size),
    "Unrolled": lambda case, k: mlopt.Unrolled(steps=k),
}


def _estimators() -> dict[str, Callable[[Case, int], Callable[[], Tensor]]]:
    estimators: dict[str, Callable[[Case, int], Any]] = {}
    for name, make in _TABLE.items():
        estimators[name] = make
        if name in COMPILED:
            estimators[f"{name} compiled"] = partial(make, compile=True)
        # The kinds of products are an axis of their own, measured with one solver.
        if name == "ConjugateGradient":
            estimators |= {f"{name} {spelling}": partial(make, products=kind) for kind, spelling in SPELLING.items()}
    # FiniteDifference is the identity with differences; the identity takes no product with H, so Gauss-Newton does not apply.
    estimators["Identity forward"] = partial(_TABLE["Identity"], products="forward")
    estimators |= _PLAIN
    return {name: partial(_hypergradient, make) for name, make in estimators.items()}


ESTIMATORS = _estimators()


class _GraphLoss:
    """The loss of a level of a graph; its signature names the levels that it refers to, as that of a function would."""

    def __init__(self, graph: Graph, name: str) -> None:
        kinds = inspect.Parameter
        own = [kinds(part, kinds.POSITIONAL_ONLY) for part in ("_module", "_batch")]
        others = [kinds(other, kinds.KEYWORD_ONLY) for other in graph.references[name]]
        self.__signature__ = inspect.Signature([*own, *others])
        self._graph, self._name = graph, name

    def __call__(self, module: nn.Module, batch: Any, /, **others: nn.Module) -> Tensor:
        modules = {self._name: module, **others}
        return self._graph.loss(self._name, lambda name: modules[name]())


def _graph(estimator: Callable[[int], Any], graph: Graph, iterations: int) -> Callable[[], Tensor]:
    levels = [
        mlopt.Level(name, module, _GraphLoss(graph, name), estimator=estimator(iterations))
        for name, module in graph.modules.items()
    ]
    made = mlopt.Problem(*levels)
    return lambda: mlopt.hypergradient(made).gradient["value"]


GRAPHS = {
    "Identity": partial(_graph, lambda k: mlopt.Identity()),
    "FiniteDifference": partial(_graph, lambda k: mlopt.FiniteDifference()),
    "ConjugateGradient": partial(_graph, lambda k: mlopt.ConjugateGradient(iterations=k, rtol=1e-12)),
    "Dense": partial(_graph, lambda k: mlopt.Dense()),
}


def closed_form(shape: str, estimator: str) -> float:
    """Return the error on a shape of `mlopt.testing`, including nests."""
    made = {"Dense": mlopt.Dense(), "ConjugateGradient": mlopt.ConjugateGradient(iterations=200, rtol=1e-12)}[estimator]
    case = testing.quadratic(shape, made, size=3)
    return case.error(mlopt.hypergradient(case.problem).gradient)


#: The settings of the `loop` section.
LOOPS: dict[str, Callable[[Case], Any]] = {
    "ConjugateGradient warm, rtol 1e-2": lambda case: mlopt.ConjugateGradient(
        iterations=50, rtol=1e-2, warm_start=True
    ),
    "ConjugateGradient warm, rtol 5e-3": lambda case: mlopt.ConjugateGradient(
        iterations=50, rtol=5e-3, warm_start=True
    ),
    "ConjugateGradient history, rtol 1e-2": lambda case: mlopt.ConjugateGradient(iterations=50, rtol=1e-2, history=20),
    "ConjugateGradient history compiled, rtol 1e-2": lambda case: mlopt.ConjugateGradient(
        iterations=50, rtol=1e-2, history=20, compile=True
    ),
    "Neumann warm, one term": lambda case: mlopt.Neumann(iterations=1, step_size=case.step_size, warm_start=True),
}


def loop(case: Case, setting: str, steps: int, watch: Callable[[], None]) -> None:
    """Run the loop of the `loop` section with `mlopt.solve`."""
    mlopt.solve(problem(case, LOOPS[setting](case), watch), steps, progress=False)
