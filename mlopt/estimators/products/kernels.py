"""The kernels that a term is traced with, so that its higher derivatives exist and are right."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...errors import SecondDerivativeError
from ...problem import Primitives, Term, faults

__all__ = [
    "differentiable_kernels",
    "graph_of",
    "is_search_due",
    "prepare",
    "refuse_once_differentiable",
    "right_kernels",
    "uses_primitives",
]

#: The code object of every backward that `once_differentiable` wraps.
_ONCE = once_differentiable(lambda ctx: None).__code__
_ERRORS = ("DelayedError", "Error", "torch::autograd::DelayedError", "torch::autograd::Error")


@contextlib.contextmanager
def differentiable_kernels(term: Term) -> Iterator[None]:
    """Trace with the attention kernel that has a second derivative, and with primitives in place of kernels that are wrong.

    Every function call costs time under `Primitives`. So a term of second order uses them only if its graph showed a need.
    """
    primitives = Primitives(term.order) if uses_primitives(term) else contextlib.nullcontext()
    with _PLAIN_ATTENTION, primitives:
        yield


class _PlainAttention:
    """The attention kernel that has a second derivative, while any thread is inside.

    `sdpa_kernel` sets flags of the process and restores those that it found. Of two threads whose regions overlap, the second to
    leave would restore the flags of the first, and the fused kernels would stay off. So the first to enter sets them, and the
    last to leave restores them.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._region = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._region.enter_context(sdpa_kernel(SDPBackend.MATH))
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._region.close()


_PLAIN_ATTENTION = _PlainAttention()


def uses_primitives(term: Term) -> bool:
    """Return True if a term is traced with primitives in place of kernels that are wrong."""
    return term.order > 2 or ("primitives", *term.label) in term.point.workspace.verified


def is_search_due(term: Term) -> bool:
    """Return True at the 1st, 2nd, 4th, 8th trace of a term and so on: its graph seldom changes, and a search takes time."""
    uses, key = term.point.workspace.uses, ("traces", str(term.order), *term.label)
    uses[key] = count = uses.get(key, 0) + 1
    return count & (count - 1) == 0


def prepare(term: Term) -> list[Tensor]:
    """Choose the kernels of a term for a transform that shows no graph, once for each workspace.

    Returns:
        The losses that it evaluated for that, with their graphs; empty if the choice was made before.
    """
    key = ("kernels", *term.label)
    roots: list[Tensor] = []
    while key not in term.point.workspace.verified:
        with differentiable_kernels(term):
            roots = term.roots()
        if right_kernels(term, graph_of(roots), forward=True):
            term.point.workspace.verified.add(key)
    return roots


def right_kernels(term: Term, graph: Iterable[Node], *, forward: bool = False) -> bool:
    """Return True if no kernel in a graph is wrong at the order of the term; otherwise the term uses primitives from now on.

    Raises:
        SecondDerivativeError: it uses primitives already, so that a call from C++ made the node.
    """
    wrong = faults((node.name() for node in graph), term.order, forward=forward)
    if not wrong:
        return True
    if uses_primitives(term):
        raise SecondDerivativeError(
            f"torch computes the derivative of order {term.order} of a kernel in the loss wrongly ({', '.join(wrong)}), and "
            "compiled or scripted code calls it; use the module without TorchScript, or products='finite_difference'"
        )
    term.point.workspace.verified.add(("primitives", *term.label))
    return False


def graph_of(roots: Sequence[Tensor]) -> set[Node]:
    """Return the nodes of the graph of some tensors."""
    pending = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen = set(pending)
    while pending:
        for following, _ in pending.pop().next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)
    return seen


def refuse_once_differentiable(graph: Iterable[Node]) -> None:
    """Raise if the graph of a value, or of its gradient, contains a function that is marked `once_differentiable`.

    The gradient's graph has an error node for such a function. Products that can avoid the node treat that part of the second
    derivative as zero. If a constant flows back into the function, there is no node at all.
    """
    for node in graph:
        backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
        if node.name() in _ERRORS or getattr(backward, "__code__", None) is _ONCE:
            raise RuntimeError("a custom autograd.Function is marked once_differentiable")
