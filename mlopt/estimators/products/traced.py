"""Reverse mode over reverse mode, traced once and compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ...errors import EstimatorError, ProblemError
from ...problem import Block, Captures, LevelTerm, Vectors, cut, derivatives, setting
from ...tensors import Tensors
from .autograd import AutogradProduct, walk
from .checked import compiler_named, differs, is_due
from .kernels import differentiable_kernels, uses_primitives
from .product import Product, name_kernels
from .tracing import Trace, trace

__all__ = ["TracedProduct"]

#: The most settings (shapes of a batch, modes of modules) of a term for which code is compiled and kept.
_MOST = 8
Evaluate = Callable[[Tensors], Tensors]
Code = Callable[..., Sequence[Tensor]]


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
        self._evaluations: dict[tuple[tuple[Block, ...], tuple[Block, ...]], tuple[Evaluate | None, str]] = {}

    @name_kernels
    def __call__(self, direction: Vectors, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        term = self.term
        if not isinstance(term, LevelTerm) or term.is_mixed(direction, wanted):
            return super().__call__(direction, wanted)
        blocks = (tuple(direction), tuple(wanted))
        if blocks not in self._evaluations:
            self._evaluations[blocks] = self._at_point(term, direction, wanted)
        evaluate, name = self._evaluations[blocks]
        if evaluate is None:
            return super().__call__(direction, wanted)
        vectors = tuple([x for block in direction for x in direction[block]])
        with compiler_named(term), torch.no_grad():
            product = cut(evaluate(vectors), wanted, term.values)
        if not is_due(term, vectors, name):
            return product
        live = AutogradProduct(term)(direction, wanted)
        gap = differs(product, live)
        if gap is not None:
            term.workspace.compiled[_key(term)] = None
            self._evaluations = dict.fromkeys(self._evaluations, (None, ""))
            self.remark(
                f"the compiled product of its {term.part} differed from the live one by {gap:.1%} and is no longer used: the "
                f"{term.part} reads numbers or flags that have changed since it was traced, or the folder of torch.compile's "
                "cache (TORCHINDUCTOR_CACHE_DIR) is of another processor; use compile=False"
            )
        return live

    def renewed(self) -> Product:
        return AutogradProduct(self.term)

    def _at_point(self, term: LevelTerm, direction: Vectors, wanted: Sequence[Block]) -> tuple[Evaluate | None, str]:
        """Return the product as a function of vectors at this point, and a name of its code; None if it must be live."""
        known = term.workspace.compiled.setdefault(_key(term), {})
        if known is None:
            return None, ""
        try:
            fixed = setting(term)
        except ProblemError as error:
            raise EstimatorError(f"level {term.name!r}: {error}, or use compile=False") from None
        key = (tuple(direction), tuple(wanted), uses_primitives(term), fixed)
        if key not in known:
            AutogradProduct(term)(direction, wanted)  # it chooses the kernels, and names those that have no derivative
            key = (tuple(direction), tuple(wanted), uses_primitives(term), fixed)
        if key not in known and len(known) < _MOST * len({other[:2] for other in [*known, key]}):
            known[key] = _Compiled(term, direction, wanted)
        if key not in known:
            return None, ""
        with compiler_named(term), torch.no_grad():
            return known[key].at(term), str(list(known).index(key))


def _key(term: LevelTerm) -> tuple[str, ...]:
    return (*term.label, "autograd")


class _Compiled:
    """The code of a term's products with directions of some blocks, for some wanted blocks.

    Args:
        term: the term at the point where it is recorded.
        direction: vectors of the shapes to come.
        wanted: the wanted blocks.

    Raises:
        EstimatorError: the term cannot be traced.
    """

    def __init__(self, term: LevelTerm, direction: Vectors, wanted: Sequence[Block]) -> None:
        def product(*vectors: Tensor) -> Tensors:
            with differentiable_kernels(term):
                gradients = derivatives(term.plain_value(), list(direction), term.values, traced=True)
            moved = walk(gradients, cut(vectors, list(direction), term.values), wanted, term.values)
            return tuple([x for block in wanted for x in moved[block]])

        vectors = tuple([x.detach() for block in direction for x in direction[block]])
        torch.clear_autocast_cache()  # it holds casts of variables as they are now
        try:
            recorded = trace(product, vectors, term.point.generators[term.name].restore)
            self._captures = Captures(term, recorded.captured)
        except Exception as error:
            raise EstimatorError(
                f"level {term.name!r}: its {term.part} cannot be traced ({str(error).strip().partition(chr(10))[0]}); use "
                "compile=False"
            ) from error
        self._trace: Trace = recorded
        self._kinds = [(x.dtype, x.stride()) for x in vectors]
        self._vectors = vectors
        self._once: Code | None = None
        self._each: Code | None = None

    def at(self, term: LevelTerm) -> Evaluate | None:
        """Return the product at a point; None if tensors there have other shapes, since those depend on numbers."""
        recorded = self._trace
        arguments = self._captures.at(term)
        if recorded.shapes:
            term.point.generators[term.name].restore()
            drawn = recorded.head(*arguments)
            if tuple(x.shape for x in drawn) != recorded.shapes:
                return None
            arguments = (*arguments, *drawn)
        if self._once is None:
            self._once = compiled(recorded.once, arguments)
        kept = (*self._once(*arguments), *(arguments[k] for k in recorded.direct))
        if self._each is None:
            self._each = compiled(recorded.each, (*kept, *self._vectors))
        each = self._each
        return lambda vectors: tuple(each(*kept, *vectors))


def compiled(graph: GraphModule, arguments: Tensors) -> Code:
    """Return a graph of tensor operations as compiled code for arguments of the same shapes, strides and dtypes."""
    import torch._inductor  # here, since the import takes as long as the rest of torch

    # `torch.compile` would check these at each call, which takes longer than the operations of a small level.
    code: Code = torch._inductor.compile(graph, list(arguments))
    return code
