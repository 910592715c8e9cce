"""Forward-mode products with a level's Hessian, compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ...problem import Block, LevelTerm, Vectors
from ...tensors import Tensors
from .checked import compiler_named, differs, is_due
from .forward import ForwardProduct
from .kernels import differentiable_kernels, prepare, uses_primitives
from .product import name_kernels

__all__ = ["CompiledProduct"]


class CompiledProduct(ForwardProduct):
    """`ForwardProduct` with a compiled product of a level's Hessian; the first call takes seconds to minutes.

    The compiled function is kept in the workspace, and compiled again when the shapes of a batch change. Dropout draws the
    same masks as in eager code. Compiled code can be wrong without a word, as when a cache of another processor's code is read:
    its product is compared with the live one at the first use of each shape of the arguments, and now and then. Where they
    differ by more than rounding, the level is reported as doubtful, and all further products are live.
    """

    @name_kernels
    def __call__(self, direction: Vectors, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        term = self.term
        if not isinstance(term, LevelTerm) or set(direction) != {term.name} or set(wanted) != {term.name}:
            return super().__call__(direction, wanted)
        prepare(term)
        if uses_primitives(term):
            # torch.compile does not apply a function mode within the transforms of torch.func (torch 2.13).
            return super().__call__(direction, wanted)
        key = (term.name, term.part)
        compiled = term.workspace.compiled
        if key not in compiled:
            compiled[key] = _compile(term)
        function = compiled[key]
        if function is None:
            return super().__call__(direction, wanted)
        arguments = (*term.own_arguments(), tuple(direction[term.name]))
        with differentiable_kernels(term), compiler_named(term):
            product = {term.name: function(*arguments)}
        if not is_due(term, str([x.shape for x in tree_leaves(arguments[2:]) if isinstance(x, Tensor)])):
            return product
        live = super().__call__(direction, wanted)
        gap = differs(product, live)
        if gap is None:
            return product  # not the live one: a resumed run counts uses anew
        compiled[key] = None
        self.remark(
            f"the compiled product of its {term.part} differed from the live one by {gap:.1%} and is no longer used; delete the "
            "folder of torch.compile's cache (TORCHINDUCTOR_CACHE_DIR), or use compile=False"
        )
        return live

    def renewed(self) -> ForwardProduct:
        return ForwardProduct(self.term)


def _compile(term: LevelTerm) -> Callable[..., Tensors]:
    function = term.own_function()

    def product(own: Tensors, rest: Mapping[str, Tensor], batch: Any, along: Tensors) -> Tensors:
        def loss(moved: Tensors) -> Tensor:
            return function(moved, rest, batch)

        image = torch.func.jvp(torch.func.grad(loss), (own,), (along,))[1]
        return tuple(x.to(v) for x, v in zip(image, own, strict=True))

    # Random numbers come from eager generators: all products of a pullback, and the training step, see the same masks.
    compiled: Callable[..., Tensors] = torch.compile(product, fullgraph=True, options={"fallback_random": True})
    return compiled
