"""Inspection of an evaluation of a loss: it must declare the levels that it depends on, and leave its batch as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from ..errors import ProblemError
from ..rng import GeneratorState
from .batch import versions

if TYPE_CHECKING:
    from .level import Level
    from .workspace import Workspace

__all__ = ["Inspection", "drawing_refused", "reading_refused", "require_unchanged"]

#: Backward functions of embeddings, whose gradient may be sparse.
_EMBEDDINGS = ("EmbeddingBackward0", "EmbeddingBagBackward0")


class Inspection:
    """Inspects one evaluation of a loss or a regularizer, and what a mixture evaluates later.

    The graph is searched at the first evaluation and then at the 2nd, 4th, 8th and so on: a reference may be used only in
    some batches, and a search takes about as long as an evaluation of a small network.

    Args:
        level: the level.
        part: "loss" or "regularizer".
        levels: all levels of the problem.
        workspace: counts the evaluations.
        tensors: the tensors of the batch.
    """

    def __init__(
        self, level: Level, part: str, levels: Iterable[Level], workspace: Workspace, tensors: Sequence[Tensor] = ()
    ) -> None:
        self._level, self._part, self._levels = level, part, levels
        count = workspace.evaluations.get((level.name, part), 0) + 1
        workspace.evaluations[level.name, part] = count
        #: Whether the graph of this evaluation is searched.
        self.searches = count & (count - 1) == 0
        self._tensors = tensors
        self._before = versions(tensors)

    def __call__(self, value: Tensor) -> None:
        """Inspect the batch and a value that the loss returned.

        Raises:
            ProblemError: the value depends on a level that the loss does not declare, has a sparse gradient, or the batch was
                changed in place.
        """
        require_unchanged(self._level, self._part, self._tensors, self._before)
        if self.searches and value.requires_grad:
            self._search(value)

    def _search(self, value: Tensor) -> None:
        level = self._level
        declared = level.loss_references if self._part == "loss" else level.regularizer_references
        ends = {
            get_gradient_edge(parameter).node: (other, name, parameter)
            for other in self._levels
            if other.name != level.name and other.name not in declared
            for name, parameter in zip(other.parameter_names, other.parameters, strict=True)
        }
        for node in _nodes(value):
            if node in ends:
                other, name, parameter = ends[node]
                if _reaches(value, parameter):
                    raise ProblemError(
                        f"the {self._part} of level {level.name!r} depends on {name!r} of level {other.name!r} and does not "
                        f"declare it, so that this dependence would be missing from hypergradients; make {other.name!r} a "
                        "keyword-only parameter of it, or detach what it takes from there"
                    )
            elif node.name() in _EMBEDDINGS and node._saved_sparse:
                raise ProblemError(
                    f"the {self._part} of level {level.name!r} uses an embedding with sparse=True, whose gradient is a sparse "
                    "tensor, and vectors over the variables must be dense; use sparse=False"
                )


def _nodes(value: Tensor) -> Iterator[Any]:
    """Yield the nodes of the graph of a value, each once."""
    pending: list[Any] = [get_gradient_edge(value).node]
    seen = set(pending)
    while pending:
        node = pending.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)


def _reaches(value: Tensor, parameter: Tensor) -> bool:
    """Return True if there is a derivative: a function with a backward of its own may pass none on along its edges."""
    try:
        return torch.autograd.grad(value, parameter, retain_graph=True, allow_unused=True)[0] is not None
    except RuntimeError:  # a compiled module cannot retain its graph
        return True


def require_unchanged(level: Level, part: str, tensors: Sequence[Tensor], before: Sequence[int]) -> None:
    """Raise if tensors of a batch were changed in place since they had these versions."""
    if versions(tensors) == before:
        return
    changed = next(t for t, was, now in zip(tensors, before, versions(tensors), strict=True) if was != now)
    raise ProblemError(
        f"the {part} of level {level.name!r} changed a tensor of its batch in place ({changed.dtype}, of shape "
        f"{tuple(changed.shape)}), and every further evaluation would see another batch; change a copy (batch.clone(), or x = x "
        "* 2 for x *= 2)"
    )


@contextmanager
def drawing_refused(level: Level, levels: Iterable[Level]) -> Iterator[None]:
    """Raise if the regularizer of a level, evaluated inside, draws random numbers."""
    devices = {parameter.device for other in levels for parameter in other.parameters}
    before = GeneratorState.capture(devices)
    yield
    if not GeneratorState.capture(devices).same_as(before):
        raise ProblemError(
            f"the regularizer of level {level.name!r} draws random numbers, which a pullback cannot replay, since it evaluates "
            "it apart from the loss; draw them in the loss"
        )


class _Reads(TorchFunctionMode):
    """Calls a function with each tensor that an operation inside the context takes."""

    def __init__(self, visit: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._visit = visit

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        for argument in (*args, *(kwargs or {}).values()):
            for tensor in argument if isinstance(argument, (list, tuple)) else (argument,):
                if isinstance(tensor, Tensor):
                    self._visit(tensor)
        return func(*args, **(kwargs or {}))


@contextmanager
def reading_refused(level: Level, levels: Iterable[Level]) -> Iterator[None]:
    """Raise if the solver of a level, called inside, uses variables of a level that the objective does not refer to."""
    undeclared = {
        id(parameter): other.name
        for other in levels
        if other.name != level.name and other.name not in level.references
        for parameter in other.parameters
    }

    def visit(tensor: Tensor) -> None:
        if id(tensor) in undeclared:
            other = undeclared[id(tensor)]
            raise ProblemError(
                f"the solver of level {level.name!r} uses variables of level {other!r}, and its loss does not refer to them, so "
                f"that the estimator could not know of this dependence; make {other!r} a keyword-only parameter of the loss and "
                "the solver, or leave it out of the solver"
            )

    with _Reads(visit):
        yield
