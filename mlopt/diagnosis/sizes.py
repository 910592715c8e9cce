"""The memory that parts of a level's evaluations take, measured at the present point, one part at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import MloptError
from ..estimators import Implicit, LinearSolve
from ..estimators.products import PRODUCTS, SecondDerivatives
from ..linear import AssumedInverse, LinearSolution, LinearSolver, MatVec
from ..problem import Estimator, Level, LevelSize, Objective, Point, PullbackCost, own_gradient, partial_derivatives
from ..tensors import Tensors
from .allocations import Allocations

__all__ = ["activations", "bytes_of", "level_size", "optimizer_size", "pullback_cost"]


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Return the bytes of the storages of some tensors; a shared one counts once."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def level_size(point: Point, level: Level) -> LevelSize:
    """Return what first derivatives of a level and its optimiser take, at a point with the rows of one process."""
    return LevelSize(
        unknowns=sum(x.numel() for x in level.parameters),
        variables=bytes_of(level.parameters),
        state=optimizer_size(level)[0],
        gradient=_gradient_peak(point, level),
    )


def pullback_cost(
    point: Point,
    level: Level,
    size: LevelSize,
    vector: Tensors,
    in_shards: Callable[[LevelSize], LevelSize] | None = None,
) -> PullbackCost | None:
    """Return what the estimator of a level states; None if it does not, or if products fail, which a diagnosis reports.

    The estimator's linear solver is not run: one product with the Hessian and one mixed product are.

    Args:
        point: the point, with the rows of one process.
        level: the level, which has an estimator.
        size: what its first derivatives take.
        vector: the vector to take products with.
        in_shards: returns the size of a level in shards from that of a whole one; None for a level that is whole.
    """
    estimator = level.estimator
    if estimator is None or type(estimator).cost is Estimator.cost:
        return None
    try:
        whole = _with_products(point, level, size, vector)
        return estimator.cost(whole if in_shards is None else in_shards(whole))
    except (MloptError, RuntimeError, NotImplementedError):
        return None


def _with_products(point: Point, level: Level, size: LevelSize, vector: Tensors) -> LevelSize:
    estimator = level.estimator
    kind = getattr(estimator, "products", "finite_difference")
    if isinstance(estimator, Implicit):
        multiplied = not isinstance(estimator.solver, AssumedInverse) and estimator.solver is not None
        product, mixed = _product_peaks(point, level, kind, vector, multiplied=multiplied)
        return attrs.evolve(size, product=product, mixed=mixed)
    product, _ = _product_peaks(point, level, kind, vector, multiplied=True)
    return attrs.evolve(size, product=product, graph=_graph(point, level, kind))


def optimizer_size(level: Level) -> tuple[int, int]:
    """Return the bytes of the state of a level's optimiser, and those that a step allocates for a moment.

    The optimiser takes a step on tensors without data; where it cannot, on copies.
    """
    if level.optimizer is None:
        return 0, 0
    try:
        state, passing = _stepped(level, [torch.empty_like(x, device="meta") for x in level.parameters])
    except (RuntimeError, NotImplementedError, TypeError):
        state, passing = _stepped(level, [x.detach().clone() for x in level.parameters])
    # On a GPU, torch steps all variables at once.
    return state, passing if level.device.type == "cpu" else max(passing, bytes_of(level.parameters))


def _stepped(level: Level, copies: Sequence[Tensor]) -> tuple[int, int]:
    parameters = [nn.Parameter(x) for x in copies]
    given: Any = level.optimizer
    if isinstance(given, Optimizer):
        copy = {id(x): p for x, p in zip(level.parameters, parameters, strict=True)}
        groups = [{**group, "params": [copy[id(x)] for x in group["params"]]} for group in given.param_groups]
        optimizer: Optimizer = type(given)(groups)  # type: ignore[call-arg]
    else:
        optimizer = given(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    with Allocations() as allocations:
        optimizer.step()
        return allocations.held, allocations.peak - allocations.held


def activations(point: Point, level: Level) -> int:
    """Return the bytes that the graph of a level's objective holds before the backward pass."""
    with Allocations() as allocations:
        value = Objective.of(level, point).value()
        held = allocations.held
    del value
    return int(held)


def _gradient_peak(point: Point, level: Level) -> int:
    with Allocations() as allocations:
        if level.residual is not None:
            own_gradient(level, point)
        else:
            partial_derivatives(point, level, Objective.of(level, point).value())
    return int(allocations.peak)


@attrs.frozen(kw_only=True, eq=False)
class _One(LinearSolver):
    """The identity; it takes one product, or none, and keeps the peak of the memory until then."""

    allocations: Allocations
    multiplied: bool
    damping: float = 0.0
    peaks: list[int] = attrs.field(factory=list)
    _in_one: ClassVar[bool] = False

    def _solve(self, matvec: MatVec, rhs: Tensors, size: float, initial: Tensors | None) -> LinearSolution:
        if self.multiplied:
            matvec(rhs)
        self.peaks.append(self.allocations.restart())
        return LinearSolution(value=rhs)


def _product_peaks(point: Point, level: Level, kind: str, vector: Tensors, *, multiplied: bool) -> tuple[int, int]:
    """Return the peaks of a product with the Hessian, 0 if none is taken, and of the mixed product after it."""
    with Allocations() as allocations:
        solver = _One(allocations=allocations, multiplied=multiplied)
        rule = LinearSolve(solver=solver, products=kind).linearize(point, level.name)
        rule.pullback({level.name: vector})
        return (solver.peaks[0] if multiplied else 0), allocations.peak


def _graph(point: Point, level: Level, kind: str) -> int:
    """Return the bytes that a graph of the gradient holds, without the gradient."""
    with Allocations() as allocations:
        products = SecondDerivatives(Objective.of(level, point), PRODUCTS[kind])
        products.gradient(level.name)
        products.forget_gradient()
        return int(allocations.held)
