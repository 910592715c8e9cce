"""Inspection of an evaluation of a loss: it must declare the levels that it depends on, and leave tensors as they are."""

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
from ..shards import is_sharded, units
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
        part: "loss", "residual" or "regularizer".
        levels: all levels of the problem.
        workspace: counts the evaluations.
        tensors: the tensors of the batch.

    Attributes:
        whole: whether each value is a whole loss, and not a loss of a mixture or its weights.
    """

    def __init__(
        self, level: Level, part: str, levels: Iterable[Level], workspace: Workspace, tensors: Sequence[Tensor] = ()
    ) -> None:
        self._level, self._part, self._levels, self._workspace = level, part, levels, workspace
        self.whole = True
        count = workspace.evaluations.get((level.name, part), 0) + 1
        workspace.evaluations[level.name, part] = count
        #: Whether the graph of this evaluation is searched.
        self.searches = count & (count - 1) == 0
        self._tensors = tensors
        self._before = versions(tensors)
        #: The variables that the loss receives, with copies of their values, and their versions.
        self._kept: list[tuple[Level, Tensor, Tensor, int]] = []
        if self.searches:
            seen = [other for other in levels if other.name in (level.name, *self._declared)]
            self._kept = [(other, v, v.detach().clone(), v._version) for other in seen for v in other.parameters]
        #: At the first evaluation all values are compared; the host then waits for the device. Writes to `.data` have no version.
        self._first = count == 1

    def __call__(self, value: Tensor) -> None:
        """Inspect the batch, the variables and a value that the loss returned.

        Raises:
            ProblemError: the value depends on a level that the loss does not declare, or has a sparse gradient; the batch or
                variables were changed in place; or nothing depends on the outermost level.
        """
        require_unchanged(self._level, self._part, self._tensors, self._before)
        if not self.searches:
            return
        self._require_unmoved()
        reached = self._search(value) if value.requires_grad else set()
        if self.whole and torch.is_grad_enabled():
            if value.requires_grad:
                self._require_connected(reached)
            self._note_unused(reached)

    @property
    def _declared(self) -> tuple[str, ...]:
        level = self._level
        return level.regularizer_references if self._part == "regularizer" else level.loss_references

    def _require_unmoved(self) -> None:
        """Raise if the evaluation wrote to variables, which then have their values back."""
        moved = [
            other
            for other, variable, value, version in self._kept
            if (self._first or variable._version != version) and not _same(variable.detach(), value)
        ]
        if not moved:
            return
        for _, variable, value, _ in self._kept:
            variable.data.copy_(value)
        raise ProblemError(
            f"the {self._part} of level {self._level.name!r} writes to variables of level {moved[0].name!r}, as a clamp of "
            "weight.data or nn.Embedding(max_norm=...) does, so each evaluation would move them; compute with the clamped "
            "value instead (torch.clamp, or torch.nn.utils.parametrize), without writing it"
        )

    def _require_connected(self, reached: set[str]) -> None:
        """Raise if this is the loss of the outermost level, and nothing in the problem depends on its variables."""
        level, (outermost, *inside) = self._level, self._levels
        if level is not outermost or not inside or level.regularizer is not None or level.name in reached:
            return
        if not any(level.name in other.references for other in inside):
            raise ProblemError(
                f"nothing depends on the variables of level {level.name!r}, the outermost: its loss does not use them, and no "
                f"level inside refers to it; make {level.name!r} a keyword-only parameter of the loss that it should change"
            )

    def _note_unused(self, reached: set[str]) -> None:
        """Keep a remark on each level that the loss declares, until an evaluation has a derivative with respect to it."""
        levels, workspace = {other.name: other for other in self._levels}, self._workspace
        # The steps of Unrolled may start at a level: the loss then declares it, and need not use it.
        estimator = self._level.estimator
        own = () if estimator is None else estimator.references
        for name in self._declared:
            if name in own:
                continue
            key = ("loss", self._level.name, name, self._part)
            if name in reached:
                workspace.verified.add(("reached", *key))
                workspace.doubts.pop(key, None)
            elif ("reached", *key) not in workspace.verified and levels[name].parameters:
                workspace.doubts[key] = (
                    f"the {self._part} of level {self._level.name!r} names {name!r} and has no derivative with respect to it, so "
                    f"this dependence is missing from hypergradients; compute with its tensors themselves, without detach, item, "
                    f"tolist or no_grad, or leave {name!r} out of its keyword-only parameters"
                )

    def _search(self, value: Tensor) -> set[str]:
        """Return the names of the levels that the value depends on."""
        level, reached = self._level, set[str]()
        ends = {
            get_gradient_edge(parameter).node: (other, name, parameter)
            for other in self._levels
            for name, parameter in _leaves(other)
        }
        known = (level.name, *self._declared)
        for node in _nodes(value):
            if node in ends:
                other, name, parameter = ends[node]
                reached.add(other.name)
                if is_sharded(parameter) and self._part != "regularizer":
                    raise ProblemError(
                        f"the {self._part} of level {level.name!r} computes with {name!r} of level {other.name!r}, which is "
                        "sharded, outside of the forward pass of its module, in which each process has its own rows; compute "
                        f"with the outputs of the module, or move that term to the regularizer of level {level.name!r}"
                    )
                if other.name not in known and (units(other.module) or _reaches(value, parameter)):
                    raise ProblemError(
                        f"the {self._part} of level {level.name!r} depends on {name!r} of level {other.name!r} and does not "
                        f"declare it, so this dependence would be missing from hypergradients; make {other.name!r} a "
                        f"keyword-only parameter of the {self._part}, or detach the tensors that it takes from there"
                    )
            elif node.name() in _EMBEDDINGS and node._saved_sparse:
                raise ProblemError(
                    f"the {self._part} of level {level.name!r} uses an embedding with sparse=True, whose gradient is a sparse "
                    "tensor, and vectors over the variables must be dense; use sparse=False"
                )
        return reached


def _leaves(level: Level) -> Iterator[tuple[str, Tensor]]:
    """Yield the variables of a level by name; of a sharded one also those that its units gather for a forward pass."""
    yield from zip(level.parameter_names, level.parameters, strict=True)
    for unit in units(level.module):
        before = sum(map(is_sharded, unit.parameters()))
        unit.unshard()
        whole = [(name, p) for name, p in unit.named_parameters() if not is_sharded(p)]
        yield from ((name, p) for name, p in whole if p.requires_grad)
        if sum(map(is_sharded, unit.parameters())) < before:
            unit.reshard()


def _same(present: Tensor, before: Tensor) -> bool:
    """Return True if two tensors are equal; NaN equals NaN."""
    return torch.equal(present, before) or bool(((present == before) | (present.isnan() & before.isnan())).all())


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
    """Raise if the solver of a level, called inside, uses variables of a level that the level does not refer to."""
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
                f"the solver of level {level.name!r} uses variables of level {other!r}, and its {level.part} does not refer to "
                f"them, so that the estimator could not know of this dependence; make {other!r} a keyword-only parameter of the "
                f"{level.part} and the solver, or leave it out of the solver"
            )

    with _Reads(visit):
        yield
