"""The steps, evaluations and products of each level in an outer step."""

from __future__ import annotations

from collections.abc import Mapping

from ..problem import Problem, PullbackCost

__all__ = ["Counts"]


class Counts:
    """Counts how often each level is stepped and pulled back in an outer step of `solve`.

    Args:
        problem: the problem.
        costs: by level that cotangents are pulled back through, what its estimator says; None if it does not know.

    Attributes:
        steps: the number of steps of each level, or of calls of its solver.
    """

    def __init__(self, problem: Problem, costs: Mapping[str, PullbackCost | None]) -> None:
        self._problem, self._costs = problem, costs
        self.steps = {problem.outermost.name: 1}
        for level in problem.levels[1:]:
            host = problem.graph[level.name].host
            assert host is not None
            self.steps[level.name] = self.steps[host] * (1 if level.solver is not None else level.steps)
        #: The number of pullbacks through each level by the steps of others; a level inside it is pulled back along with it.
        self._pullbacks = {
            name: sum(
                self.steps[host.name] for host in problem if host.response is None and name in self._parts(host.name)
            )
            for name in costs
        }
        response = problem.outermost.response
        for name, count in response.cost(problem).items() if response is not None else ():
            self.steps[name] += count

    def _parts(self, host: str) -> list[str]:
        graph = self._problem.graph
        return [part for part in graph[host].parts if graph[part].arguments]

    def evaluations(self, name: str) -> int | None:
        """Return the number of evaluations of a level's loss, each with a backward pass; None if not known.

        The levels of a nest, in which products with one level evaluate others, are not counted, nor are solvers of a level.
        """
        level, graph = self._problem[name], self._problem.graph
        nested = any(name in (part, *graph[part].interior) for part in self._costs if graph[part].interior)
        cost = self._costs.get(name, PullbackCost(memory=0))
        if nested or cost is None or level.solver is not None or level.response is not None:
            return None
        return self.steps[name] * level.accumulate + self._pullbacks.get(name, 0) * cost.evaluations

    def products(self, name: str) -> int | None:
        """Return the most products with the level's Hessian in linear solves; None if not known."""
        cost = self._costs.get(name, PullbackCost(memory=0))
        if cost is None:
            return None
        solves = self._pullbacks.get(name, 0)
        for part in self._costs:
            if name in self._problem.graph[part].interior:
                own = self._costs[part]
                if own is None:
                    return None
                # Each product with the Hessian outside solves for the response and for the multiplier of this level.
                solves += self._pullbacks[part] * (2 * own.products + 4)
        return solves * cost.products
