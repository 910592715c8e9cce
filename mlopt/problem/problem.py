"""A problem: the levels, outermost first, and the graph that their losses imply."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import torch
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from ..errors import ProblemError
from ..ranks import Ranks
from ..shards import any_sharded
from .graph import Graph
from .level import Level
from .modules import refuse_module, refuse_shared_memory
from .processes import require_alike, require_supported
from .sharded import require_shards
from .signature import settings
from .workspace import Workspace

__all__ = ["Problem"]


class Problem:
    """Levels, outermost first, and the graph read off the keyword-only parameters of their losses.

    A level is solved inside the innermost outer level that its loss depends on, directly or through the losses of inner
    levels; if there is none, inside the outermost. Printing a problem draws the graph.

    If torch.distributed has a process group, its processes share the problem: each must build it, batches are the same in all of
    them, and every process evaluates losses on its own rows of a batch.

    Args:
        levels: outermost first.
        group: the processes that share the problem: a process group of torch.distributed, "default" for the default one, or None
            for this process alone.

    Raises:
        ProblemError: a repeated name, a reference to a level that does not exist, a level that cannot influence the
            outermost objective, a level without variables, a tensor trained by two levels, a missing estimator, a parameter of a
            loss that has the name of a level and a default value, a module that is lazy or distributed over processes. On
            several processes: modules that differ between them, data that each process splits for itself, BatchNorm in
            training mode, compiled products; and processes of a launcher without a process group.

    Example:
        >>> inner = mlopt.Level("inner", mlopt.variables(torch.ones(2)), lambda inner, batch: inner().square().sum())
        >>> outer = mlopt.Level("outer", mlopt.variables(torch.ones(3)), lambda outer, batch, *, inner: inner().sum())
        >>> print(mlopt.Problem(outer, inner))
        outer  3 variables, refers to inner
        └── inner  2 variables, 1 step a solve
    """

    def __init__(self, *levels: Level, group: Any = "default") -> None:
        for position, level in enumerate(levels):
            if not isinstance(level, Level):
                raise ProblemError(
                    f"Problem: argument {position} is a {type(level).__name__}; give levels one by one, outermost first: "
                    "mlopt.Problem(outer, inner)"
                )
        if not levels:
            raise ProblemError("Problem: it has no level; give at least one")
        self.levels = levels
        self._by_name: dict[str, Level] = {}
        for level in levels:
            if level.name in self._by_name:
                raise ProblemError(f"two levels have the name {level.name!r}; rename one")
            self._by_name[level.name] = level
        if levels[0].steps != 1:
            raise ProblemError(
                f"level {levels[0].name!r}: steps={levels[0].steps}, but the outermost level is not solved inside another; "
                "leave it out, and pass the number of steps to solve"
            )
        if levels[0].warmup:
            raise ProblemError(
                f"level {levels[0].name!r}: warmup={levels[0].warmup}, but only levels inside another are warmed up; leave it out"
            )
        self.graph = Graph({level.name: level.references for level in levels})
        #: The processes that share the problem.
        self.ranks = Ranks.of(group)
        self._check_settings()
        self._check_residuals()
        self._check_solvers()
        self._check_responses()
        self._check_parameters()
        pulling = [level.name for level in levels if level.response is None]
        #: Levels that cotangents are pulled back through.
        self._pulled = {name for host in pulling for name in self.graph[host].interior if self.responds(name)}
        for level in levels:
            self._check_nesting(level)
            if level.estimator is None and self.needs_estimator(level.name):
                raise ProblemError(
                    f"level {level.name!r}: estimator=None, and its solution depends on "
                    f"{', '.join(map(repr, self.graph[level.name].arguments))}, so cotangents must be pulled back through it; "
                    "give one, such as mlopt.ConjugateGradient(iterations=10)"
                )
        #: The levels whose variables are sharded over the processes.
        self.sharded = frozenset(
            level.name for level in levels if level.sharded or any_sharded(level.module.parameters())
        )
        if self.ranks.several:
            require_supported(levels, self.ranks)
            if self.sharded:
                pulled = {level.name: self.graph[level.name].interior for level in levels if level.name in self._pulled}
                require_shards(levels, self.sharded, pulled, self.ranks)
                self.ranks = attrs.evolve(self.ranks, sharded=True)
            require_alike(levels, self.ranks, "at the start")
        #: Caches and standalone calls of everything that evaluates this problem without a workspace of its own.
        self.workspace = Workspace()

    @property
    def outermost(self) -> Level:
        """The first level."""
        return self.levels[0]

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The devices that the levels' variables are on now, each once."""
        return tuple(dict.fromkeys(p.device for level in self.levels for p in level.parameters))

    def __getitem__(self, name: str) -> Level:
        if name not in self._by_name:
            raise ProblemError(f"there is no level {name!r}; the levels are {', '.join(self._by_name)}")
        return self._by_name[name]

    def __iter__(self) -> Iterator[Level]:
        return iter(self.levels)

    def __len__(self) -> int:
        return len(self.levels)

    def needs_estimator(self, name: str) -> bool:
        """True if cotangents are pulled back through the level: it responds, and not only to a level that has a response."""
        return name in self._pulled

    def responds(self, name: str) -> bool:
        """True if the level is solved inside another, and its solution depends on other levels."""
        return self.graph[name].host is not None and bool(self.graph[name].arguments)

    def _check_settings(self) -> None:
        for level in self.levels:
            functions = {
                level.part: (level.definition, 2),
                "regularizer": (level.regularizer, 1),
                "solver": (level.solver, 2),
            }
            for part, (function, positional) in functions.items():
                for name in settings(function, positional=positional) if function is not None else ():
                    if name in self._by_name:
                        raise ProblemError(
                            f"the {part} of level {level.name!r} has a parameter {name!r} with a default value, and {name!r} is "
                            "a level, which would not be passed; remove the default (or the functools.partial that sets it), or "
                            "rename the parameter"
                        )

    def _check_residuals(self) -> None:
        for level in self.levels:
            if level.residual is None:
                continue
            if level is self.outermost:
                raise ProblemError(
                    f"level {level.name!r}: it has a residual, and the outermost level needs a loss, whose hypergradient it "
                    "follows; add an outer level whose loss refers to it"
                )
            if interior := self.graph[level.name].interior:
                raise ProblemError(
                    f"level {level.name!r}: its residual depends on the solutions of {', '.join(map(repr, interior))} inside it, "
                    "which is not supported; let one residual, of one module that holds all variables, state the conditions of "
                    "both, or list the levels in the other order"
                )

    def _check_solvers(self) -> None:
        for level in self.levels:
            if level.solver is None:
                continue
            if level is self.outermost:
                raise ProblemError(
                    f"level {level.name!r}: solver={level.solver!r}, but the outermost level is not solved: it steps with "
                    "each hypergradient; give it an optimizer"
                )
            if interior := self.graph[level.name].interior:
                raise ProblemError(
                    f"level {level.name!r}: solver={level.solver!r}, but its objective depends on the solutions of "
                    f"{', '.join(map(repr, interior))} inside it, which a solver cannot follow; give it an optimizer"
                )

    def _check_nesting(self, level: Level) -> None:
        residuals = [name for name in self.graph[level.name].interior if self[name].residual is not None]
        if residuals and self.needs_estimator(level.name):
            raise ProblemError(
                f"level {level.name!r}: cotangents are pulled back through it, and {residuals[0]!r} with its residual is solved "
                "inside it, which is not supported, because that takes second derivatives of the residual; give the outermost "
                "level a response, such as mlopt.RealSteps(steps=300), or replace the residual by a loss"
            )

    def _check_responses(self) -> None:
        for level in self.levels:
            if level.response is not None and (level is not self.outermost or len(self) == 1):
                place = (
                    "it has no level inside" if len(self) == 1 else f"the outermost level is {self.outermost.name!r}"
                )
                raise ProblemError(
                    f"level {level.name!r}: response={level.response}, which is for an outermost level with levels inside, and "
                    f"{place}; leave it out"
                )

    def _check_parameters(self) -> None:
        owners: dict[int, tuple[str, str]] = {}
        for level in self.levels:
            refuse_module(level, self.ranks)
            if not level.parameters:
                raise ProblemError(
                    f"level {level.name!r}: its {type(level.module).__name__} has no trainable parameter; set requires_grad, or "
                    "pass the module to the losses directly instead of as a level"
                )
            for name, parameter in zip(level.parameter_names, level.parameters, strict=True):
                if not parameter.is_floating_point():
                    raise ProblemError(
                        f"level {level.name!r}: parameter {name!r} is of {parameter.dtype}; "
                        "only real floating dtypes are optimised"
                    )
                if id(parameter) in owners:
                    other, other_name = owners[id(parameter)]
                    raise ProblemError(
                        f"levels {other!r} and {level.name!r} train the same tensor ({other}.{other_name} is "
                        f"{level.name}.{name}); give one of them a copy (copy.deepcopy), or freeze it if neither should train it"
                    )
                owners[id(parameter)] = (level.name, name)
        refuse_shared_memory(self.levels)

    def __rich__(self) -> Tree:
        tree = Tree(self._describe(self.outermost))
        self._grow(tree, self.outermost)
        return tree

    def _grow(self, tree: Tree, level: Level) -> None:
        for name in self.graph[level.name].guests:
            self._grow(tree.add(self._describe(self[name])), self[name])

    def _describe(self, level: Level) -> Text:
        count = sum(p.numel() for p in level.parameters)
        text = Text.assemble((level.name, "bold"), f"  {count:,} variable{'s' if count != 1 else ''}")
        if level.references:
            text.append(f", refers to {', '.join(level.references)}")
        if level.residual is not None:
            text.append(", a condition")
        if level.solver is not None:
            text.append(", a solver of its own")
        elif level is not self.outermost:
            text.append(f", {level.steps} step{'s' if level.steps != 1 else ''} a solve")
        if level.estimator is not None:
            text.append(f", {level.estimator}")
        if level.response is not None:
            taken = sum(level.response.cost(self).values())
            text.append(f", {level.response}: {taken:,} steps inside for each hypergradient")
        return text

    def __str__(self) -> str:
        console = Console(width=160, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    def __repr__(self) -> str:
        return f"Problem({', '.join(level.name for level in self.levels)})"
