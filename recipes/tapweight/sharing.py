"""Independent tasks that several processes share: each is done by one process alone, and all have the results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from mlopt.ranks import alone

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mlopt.ranks import Ranks

__all__ = ["first_before_others", "owners_of", "shared"]

T = TypeVar("T")


def shared(
    ranks: Ranks,
    tasks: Sequence[Callable[[], T]],
    costs: Sequence[float],
    *,
    send: Callable[[int, T], Any] = lambda k, result: result,
    receive: Callable[[int, Any], T] = lambda k, plain: plain,
) -> list[T]:
    """Return the results of independent tasks, in their order.

    The results are those of one process that does all: a task that seeds its random numbers does not depend on the others.

    Args:
        ranks: the processes, which all call this function.
        tasks: functions without arguments. The first process does the first one.
        costs: a number for the effort of each, by which the processes divide them.
        send: returns the result of the k-th task as a plain value on the host; not called by a process alone.
        receive: returns the result from that value, in every process.

    Raises:
        ProcessError: a task failed in another process. Its error is raised in that one. All raise once each has done its tasks.
    """
    if not ranks.several:
        return [task() for task in tasks]
    owners = owners_of(costs, ranks.size)
    plain: dict[int, Any] = {}

    def do_own() -> None:
        with alone():
            for k, task in enumerate(tasks):
                if owners[k] == ranks.rank:
                    plain[k] = send(k, task())

    ranks.all_evaluated(do_own)
    return [receive(k, ranks.of_one(plain.get(k), owner)) for k, owner in enumerate(owners)]


def owners_of(costs: Sequence[float], size: int) -> list[int]:
    """Return the process that does each task: the first one the first; then the most costly first, where the least is to do.

    Example:
        >>> from mlopt.recipes.tapweight.sharing import owners_of
        >>> owners_of([3, 1, 2, 2], 2)
        [0, 0, 1, 1]
    """
    loads, owners = [0.0] * size, [0] * len(costs)
    for k in [0, *sorted(range(1, len(costs)), key=lambda k: -costs[k])][: len(costs)]:
        owners[k] = min(range(size), key=loads.__getitem__) if k else 0
        loads[owners[k]] += costs[k]
    return owners


def first_before_others(ranks: Ranks, build: Callable[[], T]) -> T:
    """Return what the first process builds, and then the others: they find what it put into caches and downloaded.

    Raises:
        ProcessError: the first process failed.
    """
    built: list[T] = []
    ranks.by_first(lambda: built.append(build()))
    return built[0] if built else build()
