"""Products with the generalised Gauss-Newton matrix in place of the Hessian."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils._pytree import tree_map_only

from ...errors import EstimatorError
from ...problem import Block, LevelTerm, Vectors
from ...tensors import Tensors, add, zeros_like
from .autograd import AutogradProduct
from .kernels import differentiable_kernels, prepare
from .product import name_kernels

__all__ = ["GaussNewtonProduct", "cut_at_outputs"]


class GaussNewtonProduct(AutogradProduct):
    """J^T (d2 loss / d outputs2) J in place of a level's Hessian; all other products, such as the mixed one, are exact.

    The outputs are those of the level's module, J is their derivative by its variables. The matrix omits the curvature of the
    network itself. It is positive semi-definite if the loss is convex in the outputs. Terms of the loss in the variables
    themselves, such as weight decay, remain exact.

    Source: Schraudolph 2002, Neural Computation 14(7).
    """

    #: The loss cut in two, and the whole one for the mixed product.
    traces: ClassVar[int] = 2
    _linearized: _Linearized | None = None

    def is_exact(self, direction: Vectors, wanted: Sequence[Block]) -> bool:
        return (
            not isinstance(self.term, LevelTerm)
            or set(direction) != {self.term.name}
            or set(wanted) != {self.term.name}
        )

    @name_kernels
    def __call__(self, direction: Vectors, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        if self.is_exact(direction, wanted):
            return super().__call__(direction, wanted)
        assert isinstance(self.term, LevelTerm)
        return self.term.together(wanted, lambda: self._approximated(direction))

    def _approximated(self, direction: Vectors) -> dict[Block, Tensors]:
        """Return the product with the matrix of the piece of this process."""
        assert isinstance(self.term, LevelTerm)
        if self._linearized is None:
            self._linearized = _Linearized(self.term)
        return {self.term.name: self._linearized.product(direction[self.term.name])}


class _Linearized:
    """A loss cut in two at the outputs of its level's module; both halves are traced once."""

    def __init__(self, term: LevelTerm) -> None:
        self._variables = term.values[term.name]
        prepare(term)
        with (
            differentiable_kernels(term),
            cut_at_outputs(term.module, "products='gauss_newton'", "use products='autograd'") as (outputs, leaves),
        ):
            value = term.value()
        if not outputs and term.part == "loss":
            raise EstimatorError(
                f"level {term.name!r}: products='gauss_newton' needs the outputs of its {type(term.module).__name__}, but its "
                "loss never calls it with gradients; call the module in the loss, or use products='autograd'"
            )
        self._outputs, self._leaves = outputs, leaves
        arguments = [*leaves, *self._variables]
        self._arguments = arguments
        self._gradients = _grad([value], arguments, create_graph=True) if value.requires_grad else ()
        # J^T w is linear in w; its derivative by w, again in reverse mode, is the product of J with a vector.
        self._weights = [torch.zeros_like(output, requires_grad=True) for output in outputs]
        self._transposed = _grad(outputs, self._variables, self._weights, create_graph=True) if outputs else ()

    def product(self, vector: Tensors) -> Tensors:
        moved = list(vector)
        if self._outputs:
            moved = [*_grad(self._transposed, self._weights, vector), *vector]
        pairs = [(g, m) for g, m in zip(self._gradients, moved, strict=False) if g.requires_grad]
        if not pairs:
            return zeros_like(self._variables)
        bent = _grad([g for g, _ in pairs], self._arguments, [m for _, m in pairs])
        at_outputs, direct = bent[: len(self._leaves)], bent[len(self._leaves) :]
        if not self._outputs:
            return direct
        return add(_grad(self._outputs, self._variables, at_outputs), direct)


def _grad(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], weights: Any = None, *, create_graph: bool = False
) -> Tensors:
    return torch.autograd.grad(
        outputs,
        inputs,
        weights,
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )


@contextmanager
def cut_at_outputs(module: nn.Module, user: str, remedy: str) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Replace the module's outputs by leaves inside the context, and yield both; errors name the user and the remedy."""
    outputs: list[Tensor] = []
    leaves: list[Tensor] = []

    def cut(output: Tensor) -> Tensor:
        if not output.requires_grad:
            return output
        if _reaches(output, leaves):
            raise EstimatorError(
                f"{user}: the loss feeds outputs of {type(module).__name__} back into it, so its outputs are not a function of "
                f"the variables alone; {remedy}"
            )
        leaf = output.detach().requires_grad_()
        outputs.append(output)
        leaves.append(leaf)
        return leaf.clone()  # the loss may change it in place

    handle = module.register_forward_hook(lambda _module, _inputs, output: tree_map_only(Tensor, cut, output))
    try:
        yield outputs, leaves
    finally:
        handle.remove()


def _reaches(output: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Return True if the graph of an output leads to one of the leaves."""
    if not leaves:
        return False
    ends = {get_gradient_edge(leaf).node for leaf in leaves}
    pending: list[Node | None] = [output.grad_fn]
    seen: set[Node | None] = {None, *pending}
    while pending:
        node = pending.pop()
        if node in ends:
            return True
        if node is not None:
            fresh = {following for following, _ in node.next_functions} - seen
            seen |= fresh
            pending.extend(fresh)
    return False
