"""Sums over processes of what one step of a level evaluates: vectors, the loss and logged numbers in one exchange."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import ProblemError
from ..finiteness import require_finite
from ..problem import Block, Point, cut
from ..ranks import Ranks
from ..shards import is_sharded
from ..tensors import Tensors
from .row import Row

__all__ = ["StepSums"]

#: Vectors and named numbers that a process evaluated.
Pieces: TypeAlias = tuple[Sequence[Tensor], Mapping[str, Any]]
#: Shapes, dtypes and devices of the vectors, and the names of the numbers.
_Layout: TypeAlias = tuple[tuple[tuple[Any, ...], ...], tuple[str, ...]]


class StepSums:
    """Sums over processes of what the steps of levels evaluate. The processes agree on the layout at the first step of a level.

    Args:
        ranks: the processes.
        row: the values that the levels log; sums replace them.
    """

    def __init__(self, ranks: Ranks, row: Row) -> None:
        self._ranks, self._row = ranks, row
        self._layouts: dict[str, _Layout] = {}

    def on(self, row: Row) -> StepSums:
        """Return sums that replace the values of another row, with the same layouts."""
        other = StepSums(self._ranks, row)
        other._layouts = self._layouts
        return other

    def gradients(
        self, level: str, variables: Tensors, evaluate: Callable[[], tuple[Tensor, Tensor]], *, streamed: bool
    ) -> tuple[Tensor, Tensor]:
        """Set `.grad` to the sum of what the processes left there; return the sums of the loss and of another vector.

        Args:
            level: the level.
            variables: its variables. `.grad` remains None if no process uses a variable.
            evaluate: sets `.grad`, and returns the loss and a vector.
            streamed: whether the vector is that of a streamed pullback, which not every step has.
        """

        def pieces() -> tuple[list[Tensor], Tensor]:
            loss, vector = evaluate()
            used = torch.tensor([v.grad is not None for v in variables]).to(loss)
            return [*(torch.zeros_like(v) if v.grad is None else v.grad for v in variables), used, vector], loss

        (*gradients, used, vector), loss = self.step(level, pieces, kind="streamed" if streamed else "step")
        for variable, gradient, count in zip(variables, gradients, used.tolist(), strict=True):
            variable.grad = gradient if count else None
        return loss, vector

    def cotangents(
        self, level: str, point: Point, evaluate: Callable[[], tuple[dict[Block, Tensors], Tensor]]
    ) -> tuple[dict[Block, Tensors], Tensor]:
        """Return the sums of vectors by block and of the loss."""
        blocks: list[Block] = []

        def pieces() -> tuple[list[Tensor], Tensor]:
            vectors, loss = evaluate()
            blocks.extend(vectors)
            return [x for block in blocks for x in vectors[block]], loss

        total, loss = self.step(level, pieces)
        return cut(total, blocks, point.values), loss

    def step(
        self, level: str, evaluate: Callable[[], tuple[Sequence[Tensor], Tensor]], *, kind: str = "step"
    ) -> tuple[Tensors, Tensor]:
        """Return the sums of vectors and of the loss; sum what the level logs, and raise if the loss is not finite."""

        own: list[Tensor] = []

        def pieces() -> Pieces:
            vectors, loss = evaluate()
            own.extend(vectors)
            # Sharded vectors are sums already.
            return [loss, *(v for v in vectors if not is_sharded(v))], self._row.numbers

        (loss, *summed), logged = self._sum(level, f"{level}/{kind}", pieces)
        self._row.values |= logged
        require_finite((), lambda value: f"the loss of level {level!r} is {value}", size=loss)
        sums = iter(summed)
        return tuple(v if is_sharded(v) else next(sums) for v in own), loss

    def _sum(self, level: str, key: str, evaluate: Callable[[], Pieces]) -> tuple[Tensors, dict[str, Tensor]]:
        """Return the sums over processes of the vectors and numbers that each evaluates in a step of a level.

        The layout of a key is agreed on once. A process whose pieces do not fit it says so with its zeros.

        Raises:
            ProcessError: the evaluation failed in another process; in that one, its own error is raised.
            ProblemError: the processes log different names.
        """
        error: Exception | None = None
        pieces: Pieces | None = None
        try:
            pieces = evaluate()
        except Exception as raised:
            if self._ranks.sharded:
                raise  # as in Ranks.together
            error = raised
        layout = None if pieces is None else _layout(pieces)
        agreed = self._layouts.get(key)
        if agreed is not None:
            fits = layout == agreed
            total = self._ranks.sum(_flat(pieces, unfit=0.0) if fits and pieces is not None else _zeros(agreed))
            if not float(total[-1][-1]):
                return _named(total, agreed)
        # The first sum of the level, or one that the agreed layout does not fit.
        layouts = self._ranks.all_of(None if layout is None else _plain(layout))
        if None in layouts:
            self._ranks.fail(error)
        assert pieces is not None
        assert layout is not None
        for rank, other in enumerate(layouts):
            if other != layouts[0]:
                raise ProblemError(
                    f"level {level!r}: process 0 logs {_names(layouts[0])}, and process {rank} logs {_names(other)}; log the "
                    "same numbers in every process, whatever its rows are"
                )
        self._layouts[key] = layout
        return _named(self._ranks.sum(_flat(pieces, unfit=0.0)), layout)


def _layout(pieces: Pieces) -> _Layout:
    vectors, numbers = pieces
    return tuple((tuple(v.shape), v.dtype, v.device) for v in vectors), tuple(numbers)


def _plain(layout: _Layout) -> tuple[Any, ...]:
    """Return a layout as plain values, without devices, which have other indices in other processes."""
    return [(shape, str(dtype)) for shape, dtype, _ in layout[0]], layout[1]


def _names(layout: Any) -> str:
    return ", ".join(map(repr, layout[1])) or "nothing"


def _flat(pieces: Pieces, unfit: float) -> list[Tensor]:
    """Return the vectors, and the numbers as one more in the dtype of the first, with a flag at its end."""
    vectors, numbers = pieces
    like = vectors[0]
    dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
    values = [torch.as_tensor(v).detach().to(like.device, dtype).reshape(()) for v in (*numbers.values(), unfit)]
    return [*(v.detach() for v in vectors), torch.stack(values)]


def _zeros(layout: _Layout) -> list[Tensor]:
    """Return zeros of a layout, with the flag that this process has no pieces that fit."""
    vectors = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in layout[0]]
    return _flat((vectors, dict.fromkeys(layout[1], 0.0)), unfit=1.0)


def _named(total: Tensors, layout: _Layout) -> tuple[Tensors, dict[str, Tensor]]:
    *vectors, numbers = total
    return tuple(vectors), dict(zip(layout[1], numbers.unbind(), strict=False))
