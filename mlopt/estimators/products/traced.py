"""Reverse mode over reverse mode, traced once and compiled."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ...errors import EstimatorError, ProblemError
from ...problem import Block, Captures, LevelTerm, Vectors, cut, derivatives, setting
from ...tensors import Tensors
from .autograd import AutogradProduct, walk
from .checked import compiler_named, differs, is_due
from .kernels import differentiable_kernels, uses_primitives
from .product import Product, name_kernels
from .replay import Evaluate, Operations, replay
from .tracing import Part, Recording, record

__all__ = ["TracedProduct"]

#: The most settings (shapes of a batch, modes of modules) of a term for which code is compiled and kept.
_MOST = 8


class TracedProduct(AutogradProduct):
    """`AutogradProduct` as compiled code: the double backward pass is recorded once, and operations without use are left out.

    The recording is cut into what depends on the vector, which runs for each product, and what does not, which runs once at
    each point. Both are compiled, which takes seconds, and kept in the workspace for every point of the same setting: shapes,
    dtypes, modes and hooks of modules, plain values in the batch. Variables, buffers and the tensors of the batch are their
    arguments. Random numbers are drawn by eager code in the same order, so that masks are those of live products.

    The recording freezes control flow and all else that Python computed. It is therefore compared with the live product at the
    first use of a setting, and now and then. Where they differ by more than rounding, the level is reported as doubtful, and
    all further products are live.
    """

    def __init__(self, term: Any) -> None:
        super().__init__(term)
        self._evaluations: dict[
            tuple[tuple[Block, ...], tuple[Block, ...]], tuple[Evaluate, LevelTerm, str] | None
        ] = {}
        #: By blocks of the direction, the code at this point and its name; None if products must be live.
        self._points: dict[tuple[Block, ...], tuple[_AtPoint | None, str]] = {}

    @name_kernels
    def __call__(self, direction: Vectors, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        blocks = (tuple(direction), tuple(wanted))
        if blocks not in self._evaluations:
            term = self.term
            if isinstance(term, LevelTerm) and not term.is_mixed(direction, wanted):
                self._evaluations[blocks] = self._at_point(term, direction, wanted)
            else:
                self._evaluations[blocks] = None
        entry = self._evaluations[blocks]
        if entry is None:
            return super().__call__(direction, wanted)
        evaluate, term, name = entry
        with torch.no_grad():
            product = cut(evaluate(_contiguous(direction)), wanted, term.values)
        if not is_due(term, name):
            return product
        live = AutogradProduct(term)(direction, wanted)
        gap = differs(product, live)
        if gap is None:
            return product  # not the live one: a resumed run counts uses anew
        term.workspace.compiled[_key(term)] = None
        self._evaluations = dict.fromkeys(self._evaluations)
        self.remark(
            f"the compiled product of its {term.part} differed from the live one by {gap:.1%} and is no longer used: the "
            f"{term.part} reads numbers or flags that have changed since it was traced, or the folder of torch.compile's "
            "cache (TORCHINDUCTOR_CACHE_DIR) is of another processor; use compile=False"
        )
        return live

    def renewed(self) -> Product:
        return AutogradProduct(self.term)

    def _at_point(
        self, term: LevelTerm, direction: Vectors, wanted: Sequence[Block]
    ) -> tuple[Evaluate, LevelTerm, str] | None:
        """Return the product at this point as a function of vectors, the term, and a name of the code; None for live products."""
        known = term.workspace.compiled.setdefault(_key(term), {})
        if known is None:
            return None
        along = tuple(direction)
        if along not in self._points:
            key = self._setting(term, direction)
            if key not in known:
                AutogradProduct(term)(
                    direction, wanted
                )  # it chooses the kernels, and names those that have no derivative
                key = self._setting(term, direction)
            if key not in known and len(known) < _MOST * len({other[0] for other in [*known, key]}):
                known[key] = _Compiled(term, direction)
            code = known.get(key)
            self._points[along] = None if code is None else code.at(term), str(list(known).index(key) if code else "")
        values, name = self._points[along]
        if values is None:
            return None
        with compiler_named(term), torch.no_grad():
            return values.product(tuple(wanted)), term, f"{name}: {wanted}"

    def _setting(self, term: LevelTerm, direction: Vectors) -> tuple[Any, ...]:
        try:
            return tuple(direction), uses_primitives(term), setting(term)
        except ProblemError as error:
            raise EstimatorError(f"level {term.name!r}: {error}, or use compile=False") from None


def _key(term: LevelTerm) -> tuple[str, ...]:
    return (*term.label, "autograd")


def _contiguous(direction: Vectors) -> Tensors:
    # Code is compiled for strides, and a gradient of one shape can come with several: that of a sum is expanded.
    return tuple([x.detach().contiguous() for block in direction for x in direction[block]])


class _Compiled:
    """The code of a term's products with directions of some blocks.

    Args:
        term: the term at the point where it is recorded.
        direction: vectors of the shapes to come.

    Raises:
        EstimatorError: the term cannot be traced.
    """

    def __init__(self, term: LevelTerm, direction: Vectors) -> None:
        blocks = sorted(term.blocks, key=str)

        def product(*vectors: Tensor) -> Tensors:
            with differentiable_kernels(term):
                gradients = derivatives(term.plain_value(), list(direction), term.values, traced=True)
            along = cut(vectors, list(direction), term.values)
            moved = walk(gradients, along, blocks, term.values)
            return tuple([x for block in blocks for x in moved[block]])

        self.vectors = _contiguous(direction)
        torch.clear_autocast_cache()  # it holds casts of variables as they are now
        try:
            self.recording: Recording = record(product, self.vectors, term.point.generators[term.name].restore)
            self._captures = Captures(term, self.recording.captured)
        except Exception as error:
            raise EstimatorError(
                f"level {term.name!r}: its {term.part} cannot be traced ({str(error).strip().partition(chr(10))[0]}); use "
                "compile=False"
            ) from error
        flat = [block for block in blocks for _ in term.values[block]]
        self.positions = {block: [k for k, owner in enumerate(flat) if owner == block] for block in blocks}
        #: By wanted blocks, the code.
        self.codes: dict[tuple[Block, ...], _Code] = {}

    def at(self, term: LevelTerm) -> _AtPoint | None:
        """Return the code at a point; None if tensors there have other shapes, since those depend on numbers."""
        recording = self.recording
        captured = self._captures.at(term)
        values = dict(zip(recording.given, captured, strict=True))
        if recording.shared:
            term.point.generators[term.name].restore()
            drawn = recording.head(*captured)
            if any(x.shape != node.meta["val"].shape for x, node in zip(drawn, recording.shared, strict=True)):
                return None
            values |= zip(recording.shared, drawn, strict=True)
        return _AtPoint(self, values)


class _Code:
    """The compiled code of some results of a recording.

    Args:
        part: these results.
        earlier: code whose results it uses.
        values: the known tensors at the point where it is compiled.
        vectors: vectors there.
    """

    def __init__(self, part: Part, earlier: Sequence[_Code], values: dict[Node, Tensor], vectors: Tensors) -> None:
        self.part = part
        used = {*part.reads, *part.takes}
        self.earlier = [code for code in earlier if not used.isdisjoint(code.part.kept)]
        arguments = [values[node] for node in part.reads]
        self._once = compiled(part.once, arguments) if part.kept else None
        self.run(values)
        kept = [values[node] for node in part.takes]
        self._each = compiled(part.each, [*kept, *vectors])
        self._replay = replay(self._each, kept, vectors)

    def at(self, values: dict[Node, Tensor]) -> Evaluate:
        """Return the code at a point as a function of the vectors."""
        self.run(values)
        kept = [values[node] for node in self.part.takes]
        if self._replay is not None:
            return self._replay.at(kept)
        return lambda vectors: self._each(*kept, *vectors)

    def run(self, values: dict[Node, Tensor]) -> None:
        """Add what the code needs at a point to the tensors that are known there."""
        for code in self.earlier:
            code.run(values)
        if self._once is not None and self.part.kept[0] not in values:
            values |= zip(self.part.kept, self._once(*(values[node] for node in self.part.reads)), strict=True)


class _AtPoint:
    """Compiled code at a point, and the tensors that are known there."""

    def __init__(self, owner: _Compiled, values: dict[Node, Tensor]) -> None:
        self._owner, self._values = owner, values

    def product(self, wanted: tuple[Block, ...]) -> Evaluate:
        """Return the product for some wanted blocks, as a function of the vectors."""
        owner, values = self._owner, self._values
        if wanted not in owner.codes:
            earlier = list(owner.codes.values())
            for code in earlier:
                code.run(values)
            positions = [k for block in wanted for k in owner.positions[block]]
            owner.codes[wanted] = _Code(owner.recording.part(positions, values), earlier, values, owner.vectors)
        return owner.codes[wanted].at(values)


def compiled(graph: GraphModule, arguments: Sequence[Tensor]) -> Operations:
    """Return a graph of tensor operations as compiled code for arguments of the same shapes, strides and dtypes."""
    import torch._inductor  # here, since the import takes as long as the rest of torch

    with warnings.catch_warnings():
        # It comments on its own choices. Where warnings are errors, such a comment would end the compilation.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\._inductor")
        # `torch.compile` would check these at each call, which takes longer than the operations of a small level.
        # Graphs of its own, which a variable of the environment turns on, would overwrite results that are in use.
        code: Operations = torch._inductor.compile(graph, list(arguments), options={"triton.cudagraphs": False})
    return code
