"""The processes that share a problem: each holds a piece of every vector, and the vector is the sum of the pieces."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextvars import ContextVar
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn, TypeVar
from weakref import WeakKeyDictionary, ref

import attrs
import torch
import torch.distributed as dist
from torch import Tensor

from .errors import CheckpointError, ProblemError, ProcessError
from .notices import Notice, last_words
from .shards import is_sharded, local
from .tensors import Tensors, zeros_like

if dist.is_available():
    # The default arguments of its functions are the default group, which lives as long as they do if it exists when torch.compile
    # imports them.
    import torch.distributed.nn.functional

__all__ = ["ALONE", "Ranks", "alone", "launched"]

T = TypeVar("T")

_HALF = (torch.float16, torch.bfloat16)
#: Groups on the CPU for plain values, by the group whose tensors live on accelerators. All are held by torch alone.
_CONTROL: MutableMapping[Any, Callable[[], Any]] = WeakKeyDictionary()
#: The same groups with a long patience.
_PATIENT: MutableMapping[Any, Callable[[], Any]] = WeakKeyDictionary()
_PATIENCE = timedelta(days=30)
_APART: ContextVar[bool] = ContextVar("apart", default=False)


def _nothing() -> None:
    """Stand for the group of a process alone."""


@attrs.frozen(eq=False)
class Ranks:
    """The processes of a group that work on one problem, and this one among them.

    A process alone has size 1, and none of the methods communicates then. On several processes, every method must be called by
    all of them in the same order.

    Attributes:
        rank: the number of this process in the group.
        size: the number of processes.
        sharded: True if evaluations exchange values themselves, because a module is sharded.
    """

    rank: int = 0
    size: int = 1
    #: Weak references, so that `destroy_process_group` ends the threads of a group. A thread of gloo that still holds a tensor
    #: when Python ends would abort the process.
    _group_ref: Callable[[], Any] = _nothing
    _control_ref: Callable[[], Any] = _nothing
    sharded: bool = False

    @classmethod
    def of(cls, group: Any) -> Ranks:
        """Return the processes of a group of torch.distributed; "default" for the default group, None for this process alone.

        Raises:
            ProblemError: a launcher started several processes that have no group, or this process is not in the group.
        """
        if group is None or (group == "default" and _APART.get()):
            return ALONE
        if not (dist.is_available() and dist.is_initialized()):
            if group != "default":
                raise ProblemError(
                    f"Problem: group={group!r}, and torch.distributed is not initialised; call "
                    "torch.distributed.init_process_group first, or give group=None"
                )
            _refuse_unconnected()
            return ALONE
        chosen = dist.group.WORLD if group == "default" else group
        try:
            size, rank = dist.get_world_size(chosen), dist.get_rank(chosen)
        except (ValueError, TypeError, AttributeError) as error:
            raise ProblemError(
                f"Problem: group={group!r} is not a process group ({error}); give one of torch.distributed, or group=None"
            ) from error
        if rank < 0:
            raise ProblemError(
                "Problem: this process is not in the group; build the problem in the processes of the group"
            )
        return ALONE if size == 1 else cls(rank, size, ref(chosen), _control_of(chosen))

    @classmethod
    def of_work(cls, user: str) -> Ranks:
        """Return the processes of the default group, `patient`, for a function that gives each of them work of its own.

        Args:
            user: the name of the function, for the error.

        Raises:
            ProblemError: a launcher started several processes that have no group.
        """
        grouped = dist.is_available() and dist.is_initialized()
        if not (grouped or _APART.get()) and (count := launched()) > 1:
            raise ProblemError(
                f"{user}: this is one of {count} processes (WORLD_SIZE), and torch.distributed is not initialised, so that each "
                "would make the whole run; call torch.distributed.init_process_group() first, or start it without the launcher"
            )
        return cls.of("default").patient()

    @property
    def several(self) -> bool:
        """True if there is more than one process."""
        return self.size > 1

    @property
    def first(self) -> bool:
        """True for the process that writes files."""
        return self.rank == 0

    @property
    def _group(self) -> Any:
        return self._alive(self._group_ref)

    @property
    def _control(self) -> Any:
        return self._alive(self._control_ref)

    def _alive(self, reference: Callable[[], Any]) -> Any:
        # In place of None, which means the default group to torch.distributed.
        if (group := reference()) is None:
            raise ProcessError(
                f"the group of {self.size} processes that shares this problem was destroyed; use the problem before "
                "torch.distributed.destroy_process_group, or build one with group=None"
            )
        return group

    def patient(self) -> Ranks:
        """Return the same processes, whose plain values wait days for one another: for work that takes different times.

        A process that ends is still noticed at once.
        """
        if not self.several:
            return self
        if self._group not in _PATIENT:
            _PATIENT[self._group] = _beside(self._group, timeout=_PATIENCE)
        return attrs.evolve(self, control_ref=_PATIENT[self._group])

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self  # groups cannot be copied

    def are_those_of(self, group: Any) -> bool:
        """Return True if a process group has the same processes, in the same order."""
        own, other = (dist.get_process_group_ranks(x) for x in (self._group, group))
        return own == other

    def refuse(self, function: str) -> None:
        """Raise if there are several processes, for a function that does not share its work.

        Raises:
            ProblemError: there are.
        """
        if self.several:
            raise ProblemError(
                f"{function} does not work on a problem that {self.size} processes share; call it on one built with group=None, "
                "which belongs to one process"
            )

    def together(self, evaluate: Callable[[], Sequence[Tensor]], like: Sequence[Tensor]) -> Tensors:
        """Return the sum over processes of the tensors that each evaluates, by one reduction for each dtype and device.

        Args:
            evaluate: returns the pieces of this process.
            like: tensors of their shapes and dtypes.

        Raises:
            ProcessError: the evaluation failed in another process. Its error is raised in that one. So no process waits for one
                that has ended.
        """
        error: Exception | None = None
        pieces: Sequence[Tensor]
        try:
            pieces = [piece.detach() for piece in evaluate()]
        except Exception as raised:
            if self.sharded:
                raise  # the others wait in an exchange of the evaluation, which this one cannot meet
            error, pieces = raised, zeros_like(like)
        *total, failures = self.sum([*pieces, local(pieces)[0].new_full((), float(error is not None))])
        if float(failures):
            self.fail(error)
        return tuple(total)

    def sum(self, pieces: Sequence[Tensor]) -> Tensors:
        """Return the sum over processes of tensors, by one reduction for each dtype and device; sharded ones are sums already."""
        total: list[Tensor] = list(pieces)
        whole = [k for k, piece in enumerate(pieces) if not is_sharded(piece)]
        for kind in dict.fromkeys((pieces[k].dtype, pieces[k].device) for k in whole):
            here = [k for k in whole if (pieces[k].dtype, pieces[k].device) == kind]
            flat = torch.cat([pieces[k].detach().reshape(-1) for k in here])
            # Sums in half precision would depend on the number of processes.
            wide = flat.float() if flat.dtype in _HALF else flat
            self._exchange(partial(dist.all_reduce, wide, group=self._group))
            parts = wide.to(flat.dtype).split_with_sizes([pieces[k].numel() for k in here])
            for k, part in zip(here, parts, strict=True):
                # A copy, so that a vector that is kept does not hold the others in memory.
                total[k] = part.view(pieces[k].shape).clone() if len(here) > 1 else part.view(pieces[k].shape)
        return tuple(total)

    def fail(self, error: Exception | None) -> NoReturn:
        """Raise in every process after an error in some of them; `error` is that of this process, if it has one."""
        notices = self.all_of(None if error is None else Notice.of(self.rank, error))
        if error is not None:
            raise error
        self._raise(notices)

    def all_or_fail(self, value: T) -> list[T]:
        """Return the plain values of all processes, by rank; another one may call `fail` in place of this."""
        values = self.all_of(value)
        if any(isinstance(other, Notice) for other in values):
            self._raise(values)
        return values

    def _raise(self, values: Sequence[Any]) -> NoReturn:
        notice = next(value for value in values if isinstance(value, Notice))
        raise notice.error(self.size)

    def total(self, number: float) -> float:
        """Return the sum of a number over processes, on the host; also inside the transforms of torch.func."""
        if not self.several:
            return number
        with torch._C._DisableFuncTorch():
            value = torch.tensor(number, dtype=torch.float64, device="cpu")
            self._exchange(lambda: dist.all_reduce(value, group=self._control))
            return value.item()

    def most(self, numbers: Sequence[float]) -> list[float]:
        """Return the greatest of each number over processes, on the host."""
        if not self.several:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        self._exchange(lambda: dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._control))
        return values.tolist()

    def all_of(self, value: T) -> list[T]:
        """Return the plain values of all processes, by rank; also inside the transforms of torch.func."""
        if not self.several:
            return [value]
        values: list[Any] = [None] * self.size
        with torch._C._DisableFuncTorch():
            self._exchange(lambda: dist.all_gather_object(values, value, group=self._control))
        return values

    def all_evaluated(self, evaluate: Callable[[], T]) -> list[T]:
        """Return the plain values that all processes evaluate, by rank; if one fails, all raise."""
        value, error = None, None
        try:
            value = evaluate()
        except Exception as raised:
            error = raised
        values = self.all_of((error is None, value))
        if not all(done for done, _ in values):
            self.fail(error)
        return [own for _, own in values]  # type: ignore[misc]

    def meet(self, idle: Callable[[], None]) -> None:
        """Wait until all processes call this, and call `idle` now and then; signals are handled in the meantime."""
        if not self.several:
            return

        def wait() -> None:
            work: Any = dist.barrier(group=self._control, async_op=True)
            while not work.is_completed():
                idle()
                time.sleep(0.02)
            work.wait()

        self._exchange(wait)

    def of_first(self, value: T) -> T:
        """Return the plain value of the first process."""
        return self.of_one(value, 0)

    def of_one(self, value: T, rank: int) -> T:
        """Return the plain value of the process with this number."""
        if not self.several:
            return value
        values = [value]
        self._exchange(lambda: dist.broadcast_object_list(values, group_src=rank, group=self._control))
        return values[0]

    def by_first(self, action: Callable[[], T]) -> T:
        """Let the first process do something, such as write a file; all processes return its plain result, or raise its error."""
        if not self.several:
            return action()
        result, error = None, None
        if self.first:
            try:
                result = action()
            except Exception as raised:
                error = raised
        outcome = self.of_first((result, None if error is None else _Failure.of(error)))
        if error is not None:
            raise error
        if outcome[1] is not None:
            outcome[1].again()
        return outcome[0]  # type: ignore[return-value]

    def give(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the values of the first, in place."""
        if self.several:
            for tensor in tensors:
                value = tensor.detach().contiguous()
                self._exchange(partial(dist.broadcast, value, group_src=0, group=self._group))
                tensor.detach().copy_(value)

    def _exchange(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except ProcessError:
            raise
        except (RuntimeError, ValueError) as error:
            if (notice := last_words()) is not None:
                raise notice.error(dist.get_world_size()) from error
            # gloo begins with a line of its code, and adds general advice in further sentences.
            first = re.sub(r"^\[[^\]]*\] ", "", str(error).strip()).partition("\n")[0].partition(". ")[0]
            raise ProcessError(
                f"process {self.rank} of {self.size} could not exchange values with the others ({first}): another one ended, or "
                "took another way through the program; see its output"
            ) from error


ALONE = Ranks()


@attrs.frozen
class _Failure:
    """An error of the first process, as the others raise it."""

    message: str
    #: The cause matters: a run continues after a CheckpointError that the operating system caused.
    is_checkpoint: bool
    by_system: bool

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        return cls(str(error), isinstance(error, CheckpointError), isinstance(error.__cause__, OSError))

    def again(self) -> NoReturn:
        if self.is_checkpoint:
            raise CheckpointError(self.message) from OSError() if self.by_system else None
        raise ProcessError(f"process 0 failed: {self.message}")


def _control_of(group: Any) -> Callable[[], Any]:
    """Return a weak reference to a group of the same processes for values on the CPU."""
    if "gloo" in dist.get_backend(group):
        return ref(group)
    if group not in _CONTROL:
        _CONTROL[group] = _beside(group)
    return _CONTROL[group]


def _beside(group: Any, **options: Any) -> Callable[[], Any]:
    """Return a weak reference to a new group of the same processes on the CPU."""
    return ref(dist.new_group(dist.get_process_group_ranks(group), backend="gloo", **options))


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let the problems that are built inside belong to this process, also under a launcher or in a group."""
    token = _APART.set(True)
    try:
        yield
    finally:
        _APART.reset(token)


def launched() -> int:
    """Return the number of processes that a launcher started."""
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if "RANK" in os.environ and count.isdecimal() else 1


def _refuse_unconnected() -> None:
    """Raise if a launcher started several processes, which would make one run each without a process group."""
    if (count := launched()) > 1:
        raise ProblemError(
            f"Problem: this is one of {count} processes (WORLD_SIZE), and torch.distributed is not initialised, so that each "
            "would make a run of its own; call torch.distributed.init_process_group() first to share the problem, or give "
            "group=None for separate runs"
        )
