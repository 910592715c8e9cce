"""The graph that the losses imply: the level that each level is solved inside, and the order of pullbacks."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

import attrs

from ..errors import ProblemError

__all__ = ["Graph", "Node"]


@attrs.frozen
class Node:
    """The place of one level in the graph.

    Attributes:
        references: the levels that its objective names.
        host: the level that it is solved inside; None for the outermost.
        guests: the levels solved directly inside it, first to last.
        interior: the levels solved inside it, at any depth, whose solutions its objective depends on.
        parts: the maximal levels of the interior, each before those it refers to: the order of pullbacks. A level
            in the interior of a part is pulled back together with it.
        arguments: the levels outside that its solution depends on.
    """

    references: tuple[str, ...]
    host: str | None
    guests: tuple[str, ...]
    interior: tuple[str, ...]
    parts: tuple[str, ...]
    arguments: tuple[str, ...]


class Graph:
    """The nodes by name, outermost first.

    Args:
        references: for each level, outermost first, the levels that its objective names.

    Raises:
        ProblemError: an unknown level, a reference to itself, a level without influence, a cycle.
    """

    def __init__(self, references: Mapping[str, Sequence[str]]) -> None:
        self.names = tuple(references)
        self._references = {name: tuple(refs) for name, refs in references.items()}
        self._rank = {name: rank for rank, name in enumerate(self.names)}
        self._check_references()
        self._check_influence()
        hosts = {name: self._host(name) for name in self.names}
        guests = {name: tuple(reversed([n for n in self.names if hosts[n] == name])) for name in self.names}
        inside = {name: self._closure(guests, guests[name]) for name in self.names}
        interior = {name: self._interior(name, inside[name]) for name in self.names}
        arguments = {name: self._arguments(name, interior[name]) for name in self.names}
        self.nodes = {
            name: Node(
                references=self._references[name],
                host=hosts[name],
                guests=guests[name],
                interior=interior[name],
                parts=self._parts(name, interior, arguments),
                arguments=arguments[name],
            )
            for name in self.names
        }

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def _check_references(self) -> None:
        for name, refs in self._references.items():
            for ref in refs:
                if ref == name:
                    raise ProblemError(
                        f"level {name!r} refers to itself: its loss receives its own module as the first argument; remove "
                        f"the keyword-only parameter {ref!r}"
                    )
                if ref not in self._references:
                    close = difflib.get_close_matches(ref, self.names, n=1)
                    raise ProblemError(
                        f"level {name!r} refers to {ref!r}, which is not a level; the levels are "
                        f"{', '.join(self.names)}." + (f" Did you mean {close[0]!r}?" if close else "")
                    )

    def _check_influence(self) -> None:
        outermost = self.names[0]
        reached = self._closure(self._references, self._references[outermost]) | {outermost}
        for name in self.names:
            if name not in reached:
                raise ProblemError(
                    f"level {name!r} cannot influence {outermost!r}, the outermost level: neither its loss nor that of a "
                    f"level it depends on refers to {name!r}; refer to it, or leave the level out"
                )

    @staticmethod
    def _closure(edges: Mapping[str, Iterable[str]], start: Iterable[str]) -> set[str]:
        reached: set[str] = set()
        pending = list(start)
        while pending:
            name = pending.pop()
            if name not in reached:
                reached.add(name)
                pending.extend(edges[name])
        return reached

    def _host(self, name: str) -> str | None:
        """Return the innermost outer level that the loss depends on, directly or through inner levels; else the outermost."""
        rank = self._rank[name]
        if rank == 0:
            return None
        through = {n: refs if self._rank[n] > rank else () for n, refs in self._references.items()}
        reached = self._closure(through, self._references[name])
        return self.names[max((self._rank[n] for n in reached if self._rank[n] < rank), default=0)]

    def _interior(self, name: str, inside: set[str]) -> tuple[str, ...]:
        within = {n: [r for r in refs if r in inside] for n, refs in self._references.items()}
        return self._ordered(self._closure(within, within[name]))

    def _arguments(self, name: str, interior: Sequence[str]) -> tuple[str, ...]:
        system = {name, *interior}
        return self._ordered({r for n in system for r in self._references[n]} - system)

    def _parts(
        self, name: str, interior: Mapping[str, Sequence[str]], arguments: Mapping[str, Sequence[str]]
    ) -> tuple[str, ...]:
        """Sort the maximal levels of the interior so that each comes before those whose solutions it uses."""
        covered = {n for part in interior[name] for n in interior[part]}
        waiting = [n for n in interior[name] if n not in covered]
        owner = {n: part for part in waiting for n in (part, *interior[part])}
        uses = {part: {owner[a] for a in arguments[part] if a in owner} for part in waiting}
        ordered: list[str] = []
        while waiting:
            free = [n for n in waiting if not any(n in uses[other] for other in waiting)]
            if not free:
                raise ProblemError(
                    f"the solutions of {', '.join(map(repr, waiting))} depend on one another in a circle, and none is solved "
                    "inside the other; list a level after the one that it should be solved inside"
                )
            ordered.extend(free)
            waiting = [n for n in waiting if n not in free]
        return tuple(ordered)

    def _ordered(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(names, key=self._rank.__getitem__))
