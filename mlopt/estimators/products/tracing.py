"""A function of live tensors as graphs of tensor operations: its head, what is evaluated once, and what for each vector."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from ...tensors import Tensors

__all__ = ["Trace", "trace"]

_DRAWS, _DATA_SHAPED = torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape
#: Functions that hand numbers of a tensor to Python without a word to the tracer. (It refuses `item` and `bool` itself.)
_READING: set[Any] = {
    torch.equal,
    torch.allclose,
    Tensor.equal,
    Tensor.allclose,
    Tensor.tolist,
    Tensor.numpy,
    Tensor.__array__,
}


@attrs.frozen(eq=False)
class Trace:
    """A function of vectors as three graphs, and the tensors that it captured.

    Attributes:
        captured: the tensors from outside that the function read: variables, buffers, batches, constants.
        head: draws random numbers, and evaluates tensors whose shape depends on numbers; it takes `captured`, and must run as it
            is: a compiler may draw in another order.
        shapes: the shapes of the results of `head`, on which the other graphs rely; empty if `head` does nothing.
        once: everything else that does not depend on the vectors; it takes `captured`, then the results of `head`.
        direct: positions, among the arguments of `once`, of those that `each` takes too.
        each: the result; it takes the results of `once`, its arguments at `direct`, and the vectors.
    """

    captured: Tensors
    head: fx.GraphModule
    shapes: tuple[torch.Size, ...]
    once: fx.GraphModule
    direct: tuple[int, ...]
    each: fx.GraphModule


def trace(function: Callable[..., Tensors], vectors: Tensors, restore: Callable[[], None]) -> Trace:
    """Return a function of vectors as graphs, without the operations that its result does not need.

    Args:
        function: evaluated with derivatives of its own on live tensors; control flow that it takes is that of the trace.
        vectors: its arguments.
        restore: restores the random generators.

    Raises:
        RuntimeError: it reads numbers of a tensor, draws from Python's or numpy's generator, or changes a tensor in place that
            it did not make.
    """
    # Imported here since the import takes as long as that of the rest of the library.
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    # In single steps, more of an operation is outside of what depends on the vectors. Draws must stay as they are.
    steps = {target: how for target, how in select_decomp_table().items() if _DRAWS not in getattr(target, "tags", ())}
    restore()
    with _foreign_draws_refused(), _ReadsRefused():
        recorded = make_fx(function, steps)(*vectors)
    captured = _lift(recorded)
    with torch.no_grad():
        restore()
        pure = make_fx(torch.func.functionalize(recorded))(*(x.detach() for x in captured), *vectors)
    return _split(pure, captured)


class _ReadsRefused(TorchFunctionMode):
    """Raises if a function hands numbers of a tensor to Python."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READING:
            raise RuntimeError(f"it reads numbers of a tensor ({getattr(func, '__name__', func)})")
        return func(*args, **(kwargs or {}))


@contextmanager
def _foreign_draws_refused() -> Iterator[None]:
    """Raise if Python's or numpy's generator moves inside: its numbers would be constants of a trace."""
    before = _foreign_state()
    yield
    if _foreign_state() != before:
        raise RuntimeError("it draws from the generator of Python or numpy")


def _foreign_state() -> tuple[Any, ...]:
    kind, words, *rest = np.random.get_state()
    return random.getstate(), kind, np.asarray(words).tobytes(), *rest


def _lift(recorded: fx.GraphModule) -> Tensors:
    """Make the tensors that a graph holds its first arguments, each once, and return them."""
    graph, aten = recorded.graph, torch.ops.aten
    for node in [node for node in graph.nodes if node.target is aten.bernoulli.p]:
        # It draws in the order of contiguous memory. `bernoulli_` does not, and is written like this after the next pass.
        with graph.inserting_before(node):
            whole = graph.call_function(aten.clone.default, (node.args[0],), {"memory_format": torch.contiguous_format})
        node.args = (whole, *node.args[1:])
    first = next(iter(graph.nodes))
    places: dict[int, fx.Node] = {}
    captured: list[Tensor] = []
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        tensor = getattr(recorded, str(node.target))
        if id(tensor) not in places:
            with graph.inserting_before(first):
                places[id(tensor)] = graph.placeholder(f"captured_{len(captured)}")
            captured.append(tensor)
        node.replace_all_uses_with(places[id(tensor)])
        graph.erase_node(node)
    recorded.recompile()
    return tuple(captured)


def _split(pure: fx.GraphModule, captured: Tensors) -> Trace:
    """Return a graph without changes in place, cut into three."""
    _loosen(pure)
    nodes = list(pure.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    given, vectors, output = inputs[: len(captured)], inputs[len(captured) :], nodes[-1]
    changed = [n for n in nodes if _has(n, lambda target: target._schema.is_mutable and _DRAWS not in target.tags)]
    if changed:
        raise RuntimeError(f"it changes a tensor in place that it did not make ({changed[0].target})")
    bound = [node for node in nodes if _is_bound_to_numbers(node)]
    head, moving, needed = _ancestors(bound), _descendants(vectors, nodes), _ancestors([output])
    if head & moving:
        raise RuntimeError("its derivatives draw random numbers, or have shapes that depend on numbers")
    head |= {node for node in nodes if node.target is operator.getitem and node.args[0] in head}
    inner = [node for node in nodes if node.op == "call_function"]
    first = [node for node in inner if node in head]
    second = [node for node in inner if node in needed and node not in head | moving]
    third = [node for node in inner if node in needed & moving]
    later = _read_by([*second, *third, output])
    shared = [
        n for n in first if isinstance(n.meta.get("val"), Tensor) and (n in later or n in bound or _is_part(n, bound))
    ]
    arguments = [*given, *shared]
    kept = [node for node in second if node in _read_by([*third, output])]
    direct = [k for k, node in enumerate(arguments) if node in _read_by([*third, output])]
    return Trace(
        captured,
        _graph(pure, given, first, shared),
        tuple(node.meta["val"].shape for node in shared),
        _graph(pure, arguments, second, kept),
        tuple(direct),
        _graph(pure, [*kept, *(arguments[k] for k in direct), *vectors], third, output.args[0]),
    )


def _has(node: fx.Node, condition: Callable[[Any], bool]) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and condition(node.target)


def _is_bound_to_numbers(node: fx.Node) -> bool:
    """Return True for an operation that draws, or whose result has a shape that depends on numbers."""
    if not _has(node, lambda target: _DRAWS in target.tags or _DATA_SHAPED in target.tags):
        return False
    if node.target is not torch.ops.aten.index.Tensor:
        return True
    indices: Any = node.args[1]  # only masks select a number of entries that is not known before
    return any(index is not None and index.meta["val"].dtype in (torch.bool, torch.uint8) for index in indices)


def _loosen(pure: fx.GraphModule) -> None:
    """Draw the masks of dropout in new memory: they depend on the layout of activations, and on no numbers of them."""
    aten, graph = torch.ops.aten, pure.graph
    for node in [node for node in graph.nodes if node.target is aten.bernoulli.p]:
        like = node.args[0].meta["val"]
        with graph.inserting_before(node):
            kind = {"dtype": like.dtype, "device": like.device}
            new = graph.call_function(aten.empty_strided.default, (like.shape, like.stride()), kind)
        # `bernoulli` would draw in the order of contiguous memory, unlike `bernoulli_`, which dropout calls.
        node.target, node.args = aten.bernoulli_.float, (new, *node.args[1:])


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    pending = list(nodes)
    seen = set(pending)
    while pending:
        for node in pending.pop().all_input_nodes:
            if node not in seen:
                seen.add(node)
                pending.append(node)
    return seen


def _descendants(sources: Iterable[fx.Node], nodes: Sequence[fx.Node]) -> set[fx.Node]:
    seen = set(sources)
    for node in nodes:
        if not seen.isdisjoint(node.all_input_nodes):
            seen.add(node)
    return seen


def _read_by(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the nodes whose results some nodes take."""
    return {taken for node in nodes for taken in node.all_input_nodes}


def _is_part(node: fx.Node, bound: Sequence[fx.Node]) -> bool:
    return node.target is operator.getitem and node.args[0] in bound


def _graph(pure: fx.GraphModule, inputs: Sequence[fx.Node], nodes: Sequence[fx.Node], results: Any) -> fx.GraphModule:
    """Return the function from some nodes to others; its results share no memory with its arguments."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in inputs}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    own = [
        graph.call_function(torch.ops.aten.clone.default, (copies[node],)) if node in inputs else copies[node]
        for node in results
    ]
    graph.output(tuple(own))
    return fx.GraphModule(pure, graph)
