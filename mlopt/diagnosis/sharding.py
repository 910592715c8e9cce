"""The sizes of a level whose module `fully_shard` will shard, from those of the whole module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import attrs
from torch import nn

from ..errors import ProblemError
from ..problem import Level, LevelSize, Problem
from ..validation import require

__all__ = ["Sharding", "shardings"]


@attrs.frozen(kw_only=True)
class Sharding:
    """A level that `fully_shard` spreads over processes, as the process with the largest shards sees it.

    A unit gathers its parameters for a pass. In the backward pass it holds them beside their whole gradients, or these beside
    the input of the exchange that leaves one part of them. What the last unit gathers stays from the forward to the backward
    pass. A device that gathers the next unit ahead holds that one, too.

    Attributes:
        ratio: the share of the variables that the process has.
        gathered: the most bytes that units hold besides the shards.
    """

    ratio: float
    gathered: int

    @classmethod
    def of(cls, level: Level, parts: Iterable[nn.Module], processes: int) -> Sharding:
        """Return the sharding of a level by rows of its parameters, unit by unit.

        Args:
            level: the level, of one process.
            parts: the parts of its module that are given to `fully_shard` before the module itself.
            processes: the number of processes.
        """
        units, known = [], set[int]()
        # A unit gathers what those inside it do not.
        inside = sorted(
            (part for part in parts if part is not level.module), key=lambda part: len(list(part.modules()))
        )
        for module in [*inside, level.module]:
            own = {id(p): p for p in module.parameters() if id(p) not in known}
            known |= own.keys()
            units.append(sum(p.numel() * p.element_size() for p in own.values()))
        *inner, last = units
        held = 2 - 1 / processes  # the shard of the gradient comes after the gradients of the unit
        shards = sum(-(-len(p) // processes) * (p.numel() // max(len(p), 1)) for p in level.parameters)
        return cls(
            ratio=shards / sum(p.numel() for p in level.parameters),
            gathered=round(max(held * last, held * max(inner, default=0) + last)),
        )

    def of_vectors(self, size: float) -> int:
        """Return the bytes that vectors over the variables take in shards."""
        return round(self.ratio * size)

    def size(self, whole: LevelSize, activations: int) -> LevelSize:
        """Return the size of the level in shards; of a peak, all but the activations are vectors."""

        def peak(size: int) -> int:
            return self.of_vectors(max(size - activations, 0)) + min(size, activations) + self.gathered if size else 0

        return LevelSize(
            unknowns=self.of_vectors(whole.unknowns),
            variables=self.of_vectors(whole.variables),
            state=self.of_vectors(whole.state),
            gradient=peak(whole.gradient),
            product=peak(whole.product),
            mixed=peak(whole.mixed),
        )


def shardings(
    problem: Problem, sharded: Mapping[str, Iterable[nn.Module]] | None, processes: int
) -> dict[str, Sharding]:
    """Return the sharding of each level that will be sharded.

    Raises:
        ArgumentError: `sharded` names the outermost level, or one that does not exist.
        ProblemError: the estimator of such a level takes whole vectors.
    """
    inside = [level.name for level in problem.levels[1:]]
    for name in sharded or {}:
        require(
            "estimate_requirements", "sharded", name, name in inside, f"a level inside: {', '.join(inside) or 'none'}"
        )
        rule = problem[name].estimator
        if rule is not None and (reason := rule.needs_whole):
            raise ProblemError(
                f"level {name!r}: estimator={rule}: {reason}; use FiniteDifference(), or products='finite_difference'"
            )
    return {name: Sharding.of(problem[name], parts, processes) for name, parts in (sharded or {}).items()}
