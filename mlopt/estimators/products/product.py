"""The base of the products with second derivatives, and the error for kernels that have none."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, ParamSpec, TypeVar

from torch import Tensor
from torch.autograd.graph import Node

from ...errors import SecondDerivativeError
from ...problem import Block, Term, Vectors
from ...tensors import Tensors

__all__ = ["Product", "name_kernels"]

P = ParamSpec("P")
T = TypeVar("T")


#: Phrases of torch's errors for operations without a second derivative.
_COMPLAINTS = ("derivative for", "forward AD", "double backward", "twice differentiable", "once_differentiable")
#: Phrases of torch.func's errors for code that it cannot transform: recomputed activations, custom functions.
_UNTRANSFORMED = ("saved tensor hooks", "setup_context", "being transformed", "ZeroTensors are immutable")
#: Phrases of its errors for the second derivative of a compiled module.
_COMPILED = ("donated buffers", "aot_autograd does not")


def name_kernels(function: Callable[P, T]) -> Callable[P, T]:
    """Turn torch's complaint about a kernel without a second derivative into an error that names the remedy."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            text = str(error)
            first = text.partition("\n")[0]
            if any(phrase in text for phrase in _UNTRANSFORMED):
                raise SecondDerivativeError(
                    f"torch.func cannot transform the loss ({first}); gradient checkpointing and some custom functions cause "
                    "this; use products='autograd', or 'finite_difference'"
                ) from error
            if any(phrase in text for phrase in _COMPILED):
                raise SecondDerivativeError(
                    f"a module that torch.compile compiled has no second derivative ({first}); use products='forward' or "
                    "'finite_difference', or give the module as it was before torch.compile"
                ) from error
            if any(phrase in text for phrase in _COMPLAINTS):
                raise SecondDerivativeError(
                    f"a kernel in the loss has no second derivative ({first}); use "
                    "products='finite_difference', or a kernel that has one (for attention, attn_implementation='eager'; for a "
                    "recurrent network on a GPU, the loss within torch.backends.cudnn.flags(enabled=False))"
                ) from error
            raise

    return wrapped


class Product(ABC):
    """Products with the second derivatives of one term L at one point.

    With D the blocks of the direction and W the wanted blocks, the product has the components
    d/dw <grad_D L, direction> for w in W. Every product in the library is of this kind: H q has D = W = {the level},
    the mixed product D = {the level}, W = {its arguments}, and a pushforward the other way round.

    Args:
        term: the term.
    """

    #: The number of evaluations of a loss, each with a backward pass: of the graph that is kept, and of each product.
    traces: ClassVar[int] = 0
    evaluations: ClassVar[int] = 0
    #: The last finite-difference step, in units of the direction; None if none was taken.
    step: float | Tensor | None = None

    def __init__(self, term: Term) -> None:
        self.term = term
        #: Sentences about products that are in doubt.
        self.remarks: list[str] = []
        #: Blocks of directions, and wanted blocks, for which the product was compared with differences or need not be.
        self.settled: set[tuple[tuple[Block, ...], tuple[Block, ...]]] = set()

    def remark(self, sentence: str) -> None:
        """Add a sentence about a doubt, unless it is there."""
        if sentence not in self.remarks:
            self.remarks.append(sentence)

    def is_exact(self, direction: Vectors, wanted: Sequence[Block]) -> bool:
        """Return True if the product is one with second derivatives, and not with a matrix in their place."""
        return True

    def needs_verification(self, direction: Vectors, wanted: Sequence[Block]) -> bool:
        """Return True unless the product takes no second derivative: first ones, and those of a chosen matrix, are as meant."""
        return self.is_exact(direction, wanted) and not self.term.is_mixed(direction, wanted)

    def renewed(self) -> Product:
        """Return a product of the same term that has kept nothing, evaluated without a compiler."""
        return type(self)(self.term)

    @abstractmethod
    def __call__(self, direction: Vectors, wanted: Sequence[Block]) -> dict[Block, Tensors]:
        """Return the product by wanted block. `direction` and `wanted` hold blocks of the term only."""

    def gradient(self, block: Block) -> Tensors:
        """Return the term's first derivative by one of its blocks, without a graph; a product may keep and reuse the graph."""
        return self.term.derivatives([block])[block]

    def graph(self) -> set[Node]:
        """Return the nodes of the graph that the product keeps; none if it keeps no graph."""
        return set()

    def forget_gradient(self) -> None:  # noqa: B027 (a product that keeps no value has none to drop)
        """Drop the value of the first derivative, and keep its graph, in which products are taken."""

    def known_gradient(self, block: Block) -> Tensors | None:
        """Return the term's first derivative by a block if earlier products leave it behind; else None."""
        return None
