"""Independent tasks that several processes share: each is done by one process alone, and all have the results."""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING, Any, TypeVar

from mlopt.errors import Interrupted
from mlopt.notices import Watch
from mlopt.ranks import alone
from mlopt.solving import Interruption, ending_if

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mlopt.ranks import Ranks

__all__ = ["first_before_others", "in_each", "owners_of", "shared"]

T = TypeVar("T")

#: Numbers the calls of `shared`, which all processes make in the same order.
_CALLS = itertools.count()


def shared(
    ranks: Ranks,
    tasks: Sequence[Callable[[], T]],
    costs: Sequence[float],
    *,
    send: Callable[[int, T], Any] = lambda k, result: result,
    receive: Callable[[int, Any], T] = lambda k, plain: plain,
    saved: bool = False,
) -> list[T]:
    """Return the results of independent tasks, in their order.

    The results are those of one process that does all: a task that seeds its random numbers does not depend on the others. If a
    task fails or a signal ends one, the runs of `mlopt.solve` in the others end after their current step, saved, and no process
    begins another task.

    Args:
        ranks: the processes, which all call this function.
        tasks: functions without arguments. The first process does the first one.
        costs: a number for the effort of each, by which the processes divide them.
        send: returns the result of the k-th task as a plain value on the host; not called by a process alone.
        receive: returns the result from that value, in every process.
        saved: True if the tasks save their progress: then a signal waits until that is done.

    Raises:
        ProcessError: a task failed in another process. Its error is raised in that one.
        Interrupted: a signal ended a task in some process, or came while that process waited for the others.
    """
    if not ranks.several:
        return [task() for task in tasks]
    owners = owners_of(costs, ranks.size)
    watch = Watch(f"call {next(_CALLS)}")
    plain: dict[int, Any] = {}
    error: Exception | Interrupted | None = None
    with Interruption() if saved else contextlib.nullcontext() as held:

        def require_no_end() -> None:
            if held is not None and held.received is not None:
                raise Interrupted(held.status)
            if watch():
                raise Interrupted(0)

        try:
            with alone(), ending_if(watch):
                for k, task in enumerate(tasks):
                    if owners[k] == ranks.rank:
                        require_no_end()
                        plain[k] = send(k, task())
        except (Exception, Interrupted) as raised:
            watch.post(raised)
            error = raised
        except BaseException as raised:
            watch.post(raised)
            raise
        ranks.meet(lambda: watch.post(Interrupted()) if held is not None and held.received is not None else None)
        if held is not None and held.received is not None:
            error = error or Interrupted(held.status)
    if isinstance(error, Exception):
        ranks.fail(error)
    ends = ranks.all_or_fail(None if error is None else error.code)
    if any(status is not None for status in ends):
        raise Interrupted(max(int(status or 0) for status in ends))
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
        ProcessError: another process failed. Its error is raised in that one.
    """
    built: list[T] = []
    ranks.by_first(lambda: built.append(build()))
    ranks.all_evaluated(lambda: None if built else built.append(build()))
    return built[0]


def in_each(ranks: Ranks, build: Callable[[], T]) -> T:
    """Return what each process builds on its own.

    Raises:
        ProcessError: another process failed. Its error is raised in that one.
    """
    built: list[T] = []
    ranks.all_evaluated(lambda: built.append(build()))
    return built[0]
