"""The rows of a batch that one of several processes evaluates a loss on, and the piece of the loss that they make."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from ..errors import ProblemError, ProcessError
from ..ranks import ALONE, Ranks
from ..rng import GeneratorState, derive_seed

if TYPE_CHECKING:
    from .level import Level

__all__ = ["WHOLE", "Portion", "portion", "share_of_rows"]


@attrs.frozen(eq=False)
class Portion:
    """A part of a batch, and the share of it in the loss of the whole batch.

    With a loss that is a mean over rows, L = sum_r share_r L_r, where L_r is the loss of the rows of process r.

    Attributes:
        level: the name of the level.
        batch: the part.
        share: its number of rows over that of the whole batch; 1 / size if every process has the whole.
        ranks: the processes.
        drawing: the devices on which the loss draws random numbers, of which each process has its own; None if it draws none.
        counted: the losses that were evaluated before, in their order, and whether they state a count, which the processes
            exchange during an evaluation.
        copies: the number of processes that evaluate the same part.
    """

    level: str
    batch: Any
    share: float = 1.0
    ranks: Ranks = ALONE
    drawing: tuple[torch.device, ...] | None = None
    counted: dict[tuple[str, str], bool] = attrs.field(factory=dict)
    copies: int = 1

    @property
    def counts(self) -> float:
        """The factor of what the loss counts here in the sum over processes: a part may be evaluated by others, too."""
        return 1.0 / self.copies if self.share else 0.0

    def weigh(self, count: Any, loss: str) -> float:
        """Return the share of this part in a loss that is a mean over `count` things here; over rows if None.

        Raises:
            ProblemError: it is not a number >= 0, or the loss states a count in some evaluations or processes only.
            ProcessError: the evaluation of the loss failed in another process.
        """
        if not self.ranks.several:
            return self.share
        counts = count is not None
        if self.agreed(loss, "a count" if counts else "no count") != counts:
            self._leave(loss)
            raise ProblemError(
                f"{loss} of level {self.level!r} states {'a' if counts else 'no'} count, and at its first evaluation it did "
                f"{'not' if counts else 'state one'}; return a count in every evaluation or in none"
            )
        if not counts:
            return self.share
        here = _number(count)
        if not 0.0 <= here < math.inf:
            self._leave(loss)
            raise ProblemError(
                f"the count of a loss is {count}; it must be the number, >= 0, of things that it is a mean over"
            )
        if self.share == 0.0:
            here = 0.0  # the row of another process
        total = self.ranks.total(here)
        if math.isnan(total):
            raise ProcessError(f"another process failed to evaluate {loss} of level {self.level!r}; see its error")
        return here / total if total else self.share

    def agreed(self, loss: str, stated: str) -> bool:
        """Return True if a loss states a count, on which all processes agree at its first evaluation.

        Args:
            loss: the loss.
            stated: "a count", "no count", or "a Mixture", whose losses state their own.

        Raises:
            ProblemError: the processes state different things.
            ProcessError: the first evaluation failed in another process.
        """
        key = (self.level, loss)
        if key not in self.counted:
            own = self.ranks.all_or_fail(stated)
            for rank, other in enumerate(own):
                if other != own[0]:
                    raise ProblemError(
                        f"{loss} of level {self.level!r} returns {own[0]} in process 0, and {other} in process {rank}; return "
                        "the same in every process, whatever its rows are"
                    )
            self.counted[key] = stated == "a count"
        return self.counted[key]

    @contextlib.contextmanager
    def evaluating(self, loss: str) -> Iterator[None]:
        """Evaluate a loss inside; if that fails, the processes that wait for its count fail, too."""
        try:
            with self.numbers():
                yield
        except Exception as error:
            # In an evaluation of a sharded module, the others wait in an exchange that this process cannot meet.
            if not self.ranks.sharded:
                if (self.level, loss) not in self.counted:
                    self.ranks.fail(error)
                self._leave(loss)
            raise

    def _leave(self, loss: str) -> None:
        """Meet the next exchange of a count that the others make in this evaluation, if there is one, with none."""
        later = itertools.dropwhile(lambda key: key != (self.level, loss), self.counted)
        if any(self.counted[key] for key in later if key[0] == self.level):
            self.ranks.total(math.nan)

    @contextlib.contextmanager
    def numbers(self) -> Iterator[None]:
        """Let the processes draw different random numbers inside; outside, all draw the same ones.

        The seeds depend on the common state and the number of the process, so that a replay of an evaluation draws the same.
        """
        if self.drawing is None:
            yield
            return
        common = GeneratorState.capture(self.drawing)
        with torch._C._DisableFuncTorch():
            words = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
        GeneratorState.seeded(derive_seed("rows", words, self.ranks.rank), self.drawing).restore()
        try:
            yield
        finally:
            common.restore()
            torch.default_generator.manual_seed(derive_seed("next", words))


WHOLE = Portion("", None)


def portion(
    level: Level,
    batch: Any,
    ranks: Ranks,
    *,
    drawing: tuple[torch.device, ...] | None = None,
    counted: dict[tuple[str, str], bool] | None = None,
) -> Portion:
    """Return the part of a batch on which this process evaluates the loss of a level.

    Process r of R takes every row from r n / R to (r + 1) n / R, rounded down; one without rows takes the first at share zero. A
    level with `split=False` or without data is evaluated on the whole batch by each.

    Args:
        level: the level.
        batch: the whole batch, the same in every process.
        ranks: the processes.
        drawing: the devices on which the loss draws random numbers; None if it draws none.
        counted: the losses that were evaluated before, and whether they state a count; others are added.

    Raises:
        ProblemError: the batch cannot be split.
    """
    if not ranks.several:
        return Portion(level.name, batch)
    counted = {} if counted is None else counted
    if batch is None or not level.splits:
        return Portion(level.name, batch, 1.0 / ranks.size, ranks, counted=counted, copies=ranks.size)
    if callable(own := getattr(batch, "portion", None)):
        part, share = own(ranks.rank, ranks.size)
        return Portion(level.name, part, float(share), ranks, drawing, counted)
    rows = _rows_of(level, batch, ranks)
    start, stop, share = share_of_rows(rows, ranks.rank, ranks.size)
    return Portion(level.name, _taken(batch, slice(start, stop), rows), share, ranks, drawing, counted)


def share_of_rows(rows: int, rank: int, size: int) -> tuple[int, int, float]:
    """Return the first row of a process, the row after its last, and its share; the first row at share zero if it has none.

    Example:
        >>> from mlopt.problem.rows import share_of_rows
        >>> [share_of_rows(3, rank, 4) for rank in range(4)]
        [(0, 1, 0.0), (0, 1, 0.3333333333333333), (1, 2, 0.3333333333333333), (2, 3, 0.3333333333333333)]
    """
    start, stop = rank * rows // size, (rank + 1) * rows // size
    return (start, stop, (stop - start) / rows) if stop > start else (0, 1, 0.0)


def _number(count: Any) -> float:
    """Return a count as a number; NaN if it is not one."""
    try:
        return float(count)
    except (TypeError, ValueError, RuntimeError):
        return math.nan


def _rows_of(level: Level, batch: Any, ranks: Ranks) -> int:
    sizes = sorted(set(_sizes(level, batch)))
    if len(sizes) != 1 or sizes[0] == 0:
        state = f"tensors of {' and '.join(map(str, sizes))} rows" if sizes else "no tensor with rows"
        raise ProblemError(
            f"level {level.name!r}: its batch has {state}, so it cannot be split over {ranks.size} processes by rows; give its "
            "type a method portion(rank, size) that returns a part and its share, or evaluate the level on the whole batch in "
            "each process with Level(split=False)"
        )
    return sizes[0]


def _sizes(level: Level, batch: Any) -> Iterator[int]:
    """Yield the number of rows of each tensor of a batch."""
    if isinstance(batch, Tensor):
        if batch.dim():
            yield len(batch)
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _sizes(level, value)
    elif isinstance(batch, list) and batch and all(isinstance(entry, str) for entry in batch):
        yield len(batch)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _sizes(level, value)
    elif not isinstance(batch, (bool, int, float, str, bytes, type(None))):
        raise ProblemError(
            f"level {level.name!r}: its batch holds a {type(batch).__name__}, whose rows are not known, so it cannot be split "
            "over processes; give its type a method portion(rank, size) that returns a part and its share, or evaluate the level "
            "on the whole batch in each process with Level(split=False)"
        )


def _taken(batch: Any, rows: slice, count: int) -> Any:
    """Return some rows of every tensor of a batch, and of lists with an entry for each row."""
    if isinstance(batch, Tensor):
        return batch[rows] if batch.dim() else batch
    if isinstance(batch, Mapping):
        own = {key: _taken(value, rows, count) for key, value in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return own
        other = copy.copy(batch)
        other.update(own)
        return other
    if isinstance(batch, list) and len(batch) == count and not any(isinstance(x, (Tensor, list, tuple)) for x in batch):
        return batch[rows]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_taken(value, rows, count) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(_taken(value, rows, count) for value in batch)
    return batch
