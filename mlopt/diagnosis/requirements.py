"""The memory and the passes of an outer step, estimated before a run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Any

import attrs
import torch
from rich.console import RenderableType
from rich.table import Table
from torch import nn

from ..estimators import Implicit
from ..hypergradient import seeded_generators
from ..linear import AssumedInverse
from ..problem import Level, LevelSize, Point, Problem, PullbackCost, Stream, Workspace
from ..problem.rows import portion
from ..ranks import Ranks
from ..rng import derive_seed, preserved
from ..validation import is_whole, require
from .counts import Counts
from .evaluation import fixed_batches, put_back, rendered
from .measurements import random_vector
from .sharding import Sharding, shardings
from .sizes import activations, bytes_of, level_size, optimizer_size, pullback_cost

__all__ = ["LevelRequirements", "Requirements", "estimate_requirements"]

_MIB = 2**20

#: The columns of the table: memory first, then counts.
_HEADINGS = {
    "variables": "variables",
    "gradient": "gradients",
    "optimizer": "optimizer state",
    "step": "for one step",
    "kept": "kept by estimator",
    "pullback": "for one pullback",
    "steps": "steps",
    "evaluations": "loss evaluations",
    "products": "Hessian products",
}


@attrs.frozen(kw_only=True)
class LevelRequirements:
    """The memory and the passes that one level takes in an outer step; memory in bytes, of one process.

    Attributes:
        variables: its parameters and buffers.
        gradient: the gradients of its variables, which a run keeps from one step to the next.
        optimizer: the state of its optimiser.
        step: the most that a step allocates besides: activations, a first derivative, and what the optimiser needs for a moment.
        kept: what its estimator keeps from one outer step to the next.
        pullback: the most that a pullback through it allocates; None if its estimator does not state it.
        steps: the number of its steps.
        evaluations: the most evaluations of its loss, each with a backward pass; None if not known.
        products: the most products with its Hessian in linear solves, which may converge earlier; None if not known.
    """

    variables: int
    gradient: int
    optimizer: int
    step: int
    kept: int
    pullback: int | None
    steps: int
    evaluations: int | None
    products: int | None


@attrs.frozen(kw_only=True)
class Requirements:
    """The memory and the passes of an outer step of `solve`; it prints as a table.

    Attributes:
        processes: the number of processes, each of which evaluates its rows of a batch, and holds all variables, but of sharded
            levels its part.
        levels: the requirements of each level by name.
        memory: the most bytes that one process holds in an outer step, modules included, batches not.
        unknown: the levels with an estimator whose cost is not known; `memory` does not include their pullbacks.

    Example:
        >>> from mlopt.testing import logistic_regression
        >>> problem = logistic_regression(mlopt.ConjugateGradient(iterations=3)).problem
        >>> mlopt.diagnose(problem).requirements.levels["regression"].products
        3
    """

    processes: int
    levels: dict[str, LevelRequirements]
    memory: int
    unknown: tuple[str, ...] = ()

    def __rich__(self) -> RenderableType:
        several = f", for one of {self.processes} processes" if self.processes > 1 else ""
        table = Table(
            title=f"an outer step{several}: memory in MiB (2^20 bytes), and the most passes", title_justify="left"
        )
        for heading in ("level", *_HEADINGS.values()):
            table.add_column(heading, justify="left" if heading == "level" else "right")
        names = list(_HEADINGS)
        for level, own in self.levels.items():
            memory = [_mib(getattr(own, name)) for name in names[:6]]
            counts = ["not known" if (n := getattr(own, name)) is None else f"{n:,}" for name in names[6:]]
            table.add_row(level, *memory, *counts)
        missing = f", without pullbacks through {', '.join(self.unknown)}" if self.unknown else ""
        table.caption, table.caption_justify = (
            f"peak of a process: {_mib(self.memory)} MiB{missing}: variables, gradients, optimizer states and what is kept, of "
            "all levels, and the largest step or pullback; batches are not included",
            "left",
        )
        return table

    def __str__(self) -> str:
        return rendered(self)


def _mib(size: int | None) -> str:
    return "not known" if size is None else f"{size / _MIB:,.3g}" if size < 1000 * _MIB else f"{size / _MIB:,.0f}"


def estimate_requirements(
    problem: Problem,
    batches: Mapping[str, Any] | None = None,
    *,
    processes: int = 1,
    sharded: Mapping[str, Iterable[nn.Module]] | None = None,
    seed: int = 0,
) -> Requirements:
    """Estimate the memory and the passes of an outer step of `solve`, before the run.

    Counts of vectors are those that the estimators and their linear solvers state; activations and products are measured: each
    loss is evaluated on the rows of one process, and one product of each kind is taken. No optimiser state is allocated, and no
    linear solve is run. With several processes, each holds all variables, gradients, states and vectors; activations are those
    of its rows. The first outer step has the peak, since products are compared with differences there. The options of `solve`,
    such as `lookahead`, are left out, and so are batches, a vector for the decoupled decay of AdamW, what kernels allocate for a
    moment, and `.grad` that a callback keeps. Counts are upper bounds: a linear solve that converges ends earlier, and a warm
    start takes one product more.

    Of a level that `fully_shard` will shard, a process holds its part of every vector, and beside them what the largest unit
    gathers: with s bytes in the unit and R processes, (2 - 1 / R) s in the backward pass.

    Args:
        problem: the problem, of one process; its modules hold the point.
        batches: the batch of each level by name; a missing one is the first of the level's data, in the order of `seed`.
        processes: the number of processes that will share the problem.
        sharded: by level that `fully_shard` will shard over the processes, the parts of its module that are given to it before
            the module itself; modules are whole here.
        seed: seed of the random numbers that the losses draw, and of the data's order.

    Returns:
        Bytes and counts for each level, and the peak of a process; it prints as a table.

    Raises:
        ArgumentError: `processes` is not a whole number above zero, or `sharded` names a level that cannot be sharded.
        ProblemError: a batch cannot be split over the processes, or the estimator of a sharded level takes whole vectors.

    Example:
        >>> from mlopt.diagnosis import estimate_requirements
        >>> from mlopt.testing import logistic_regression
        >>> result = estimate_requirements(logistic_regression(mlopt.Neumann(iterations=3, step_size=0.1)).problem)
        >>> result.levels["regression"].evaluations, result.levels["regression"].products
        (2, 3)
    """
    require("estimate_requirements", "processes", processes, is_whole(processes, 1), "a whole number >= 1")
    problem.ranks.refuse("estimate_requirements")
    fixed = fixed_batches(problem, batches, seed)
    shards = shardings(problem, sharded, processes)
    # The last process has the most rows.
    ranks = Ranks(processes - 1, processes)
    parts = {level.name: portion(level, fixed[level.name], ranks).batch for level in problem}
    curvature = {level.name: _curvature_batches(level, ranks, seed) for level in problem}
    with put_back(problem), preserved(problem.devices):
        generators = seeded_generators(problem, "seed", seed)
        point = Point(problem, parts, generators, curvature_batches=curvature, workspace=Workspace())
        sizes = {level.name: level_size(point, level) for level in problem}
        in_shards = {
            name: partial(own.size, activations=activations(point, problem[name])) for name, own in shards.items()
        }
        costs = {
            level.name: pullback_cost(
                point,
                level,
                sizes[level.name],
                random_vector(level, torch.Generator().manual_seed(seed)),
                in_shards.get(level.name),
            )
            for level in problem
            if problem.needs_estimator(level.name)
        }
    sizes |= {name: spread(sizes[name]) for name, spread in in_shards.items()}
    counts = Counts(problem, costs)
    levels = {
        level.name: _requirements(level, sizes[level.name], costs, counts, processes, shards.get(level.name))
        for level in problem
    }
    unknown = tuple(name for name, cost in costs.items() if cost is None)
    return Requirements(processes=processes, levels=levels, memory=_peak(problem, levels, shards), unknown=unknown)


def _curvature_batches(level: Level, ranks: Ranks, seed: int) -> list[Any]:
    """Return the rows of one process of the batches that a pullback takes the Hessian on; none if it takes the level's."""
    rule = level.estimator
    if rule is None or rule.curvature_data is None or rule.curvature_batches == "all":
        return []
    stream = Stream(level.name, rule.curvature_data, derive_seed("curvature", seed), level.device)
    return [portion(level, batch, ranks).batch for batch in stream.take(rule.curvature_batches)]


def _requirements(
    level: Level,
    size: LevelSize,
    costs: Mapping[str, PullbackCost | None],
    counts: Counts,
    processes: int,
    sharding: Sharding | None,
) -> LevelRequirements:
    cost, tensors = costs.get(level.name), (bytes_of([*level.module.parameters()]), optimizer_size(level)[1])
    variables, passing = tensors if sharding is None else map(sharding.of_vectors, tensors)
    # A sum over processes takes a flat vector and its parts; the shards of a vector are sums already.
    exchanged = 2 * size.variables if processes > 1 and sharding is None else 0
    return LevelRequirements(
        variables=variables + bytes_of([*level.module.buffers()]),
        gradient=size.variables,
        optimizer=size.state,
        step=max(size.gradient - size.variables, passing, exchanged),
        kept=cost.kept if cost is not None else 0,
        pullback=None if level.name in costs and cost is None else (cost.memory + exchanged if cost is not None else 0),
        steps=counts.steps[level.name],
        evaluations=counts.evaluations(level.name),
        products=counts.products(level.name),
    )


def _peak(problem: Problem, levels: Mapping[str, LevelRequirements], shards: Collection[str]) -> int:
    """Return the most bytes that one process holds: in a step of a level, or in a pullback through one."""
    whole = [level.module for level in problem if level.name not in shards]
    tensors = [x for module in whole for x in (*module.parameters(), *module.buffers())]
    variables = bytes_of(tensors) + sum(levels[name].variables for name in shards)
    gradients = {name: own.gradient for name, own in levels.items()}
    moments = [0]
    for level in problem:
        node, others = problem.graph[level.name], sum(gradients.values()) - gradients[level.name]
        cotangents = gradients[level.name] + sum(gradients[name] for name in node.interior if name in node.references)
        moments.append(others + gradients[level.name] + levels[level.name].step)
        if level.response is None:
            moments.append(others + cotangents)
            for part in (part for part in node.parts if problem.graph[part].arguments):
                if level is problem.outermost and _frees_gradient(problem, part):
                    others -= gradients[part]
                moments.append(others + cotangents + (levels[part].pullback or 0))
        else:  # steps inside, beside what restores the levels inside
            inside = [levels[other.name] for other in problem.levels[1:]]
            snapshot = sum(own.variables + own.optimizer + own.gradient for own in inside)
            moments.append(sum(gradients.values()) + snapshot + max(own.step for own in inside))
    return variables + sum(own.optimizer + own.kept for own in levels.values()) + max(moments)


def _frees_gradient(problem: Problem, name: str) -> bool:
    """Return True if the last pullback through a level in an outer step frees `.grad`, as it assumes the inverse Hessian."""
    rule, inside = problem[name].estimator, problem.graph[name].parts
    leaf = not any(problem.graph[part].arguments for part in inside) and problem[name].residual is None
    return leaf and isinstance(rule, Implicit) and isinstance(rule.solver, AssumedInverse | None)
