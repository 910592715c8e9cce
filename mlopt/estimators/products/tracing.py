"""A function of live tensors as graphs of tensor operations: its head, what is evaluated once, and what for each vector."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...tensors import Tensors

__all__ = ["Part", "Recording", "record"]

_DRAWS, _DATA_SHAPED = torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape
#: Functions that hand numbers of a tensor to Python without a word to the dispatcher.
_READING: set[Any] = {
    torch.equal,
    torch.allclose,
    Tensor.equal,
    Tensor.allclose,
    Tensor.tolist,
    Tensor.numpy,
    Tensor.__array__,
    Tensor.__dlpack__,
}
#: Functions that do so with the tensors of a list, and with a second tensor.
_MAKING: set[Any] = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor, Tensor.__getitem__}
_SPLITTING: set[Any] = {torch.tensor_split, Tensor.tensor_split}


@attrs.frozen(eq=False)
class Part:
    """The code of some results of a recorded function.

    Attributes:
        reads: the tensors that `once` takes.
        once: evaluates what does not depend on the vectors, for every vector; with the results `kept`.
        kept: the tensors that it adds to those that are known.
        takes: the known tensors that `each` takes, before the vectors.
        each: evaluates the results for some vectors.
    """

    reads: Sequence[fx.Node]
    once: fx.GraphModule
    kept: Sequence[fx.Node]
    takes: Sequence[fx.Node]
    each: fx.GraphModule


class Recording:
    """A function of vectors as a graph of operations, from which the code of some of its results can be cut.

    Args:
        pure: the graph, whose operations change nothing in place.
        captured: the tensors that the function read, the first arguments of the graph.

    Attributes:
        captured: these tensors: variables, buffers, batches, constants.
        given: the nodes that they are the values of.
        head: draws random numbers, and evaluates tensors whose shape depends on numbers; it takes `captured`, and must run as it
            is, since a compiler may draw in another order.
        shared: the nodes of its results; empty if it does nothing.

    Raises:
        RuntimeError: draws or shapes depend on the vectors, or a captured tensor is changed in place.
    """

    def __init__(self, pure: fx.GraphModule, captured: Tensors) -> None:
        _loosen(pure)
        self._pure, self.captured = pure, captured
        self._nodes = nodes = list(pure.graph.nodes)
        inputs = [node for node in nodes if node.op == "placeholder"]
        self.given, self._vectors = inputs[: len(captured)], inputs[len(captured) :]
        self._results: Any = nodes[-1].args[0]
        changed = [n for n in nodes if _has(n, lambda target: target._schema.is_mutable and _DRAWS not in target.tags)]
        if changed:
            raise RuntimeError(f"it changes a tensor in place that it did not make ({changed[0].target})")
        bound = [node for node in nodes if _is_bound_to_numbers(node)]
        self._moving, head = _descendants(self._vectors, nodes), _ancestors(bound)
        if head & self._moving:
            raise RuntimeError("its derivatives draw random numbers, or have shapes that depend on numbers")
        head |= {node for node in nodes if node.target is operator.getitem and node.args[0] in head}
        first = self._calls(head)
        later = _read_by(node for node in nodes if node not in head)
        self.shared = [n for n in first if isinstance(n.meta.get("val"), Tensor) and (n in later or n in bound)]
        self.shared += [n for n in first if n not in self.shared and _is_part(n, bound)]
        self.head = _graph(pure, self.given, first, self.shared)

    def part(self, positions: Sequence[int], known: Collection[fx.Node]) -> Part:
        """Return the code of some results, which uses tensors that are known at a point."""
        results = [self._results[k] for k in positions]
        needed = _ancestors(results, known)
        second, third = self._calls(needed - self._moving - set(known)), self._calls(needed & self._moving)
        read = _read_by(third) | set(results)
        kept = [node for node in second if node in read]
        takes = [*kept, *(node for node in known if node in read)]
        reads = [node for node in known if node in _read_by(second)]
        once, each = (
            _graph(self._pure, reads, second, kept),
            _graph(self._pure, [*takes, *self._vectors], third, results),
        )
        return Part(reads, once, kept, takes, each)

    def _calls(self, chosen: Collection[fx.Node]) -> list[fx.Node]:
        """Return the operations among some nodes, in their order."""
        return [node for node in self._nodes if node in chosen and node.op == "call_function"]


def record(function: Callable[..., Tensors], vectors: Tensors, restore: Callable[[], None]) -> Recording:
    """Return a function of vectors as a recording.

    Args:
        function: evaluated with derivatives of its own on live tensors; control flow that it takes is that of the recording.
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

    def guarded(*tensors: Tensor) -> Tensors:
        with _NumbersRefused():  # type: ignore[no-untyped-call]
            return function(*tensors)

    restore()
    with _foreign_draws_refused(), _ReadsRefused():
        recorded = make_fx(guarded, steps)(*vectors)
    captured = _lift(recorded)
    with torch.no_grad():
        restore()
        pure = make_fx(torch.func.functionalize(recorded))(*(x.detach() for x in captured), *vectors)
    return Recording(pure, captured)


class _ReadsRefused(TorchFunctionMode):
    """Raises if a function hands numbers of a tensor to Python, or makes a tensor of them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [*args, *(kwargs or {}).values()]
        if func is Tensor.__getitem__ and isinstance(args[1], tuple):
            given = [x for x in args[1] if isinstance(x, list)]
        listed = func in _MAKING and any(isinstance(x, list | tuple) and _holds_tensors(x) for x in given)
        split = func in _SPLITTING and sum(isinstance(x, Tensor) for x in given) > 1
        if func in _READING or listed or split:
            raise RuntimeError(f"it reads numbers of a tensor ({getattr(func, '__name__', func)})")
        return func(*args, **(kwargs or {}))


class _NumbersRefused(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises where a tensor becomes a number: `item`, a condition, an index, an argument that is a number."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("it reads numbers of a tensor (item, a condition, or an argument that must be a number)")
        return func(*args, **(kwargs or {}))


def _holds_tensors(data: Any) -> bool:
    return any(isinstance(x, Tensor) for x in tree_leaves(data))


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
        if not isinstance(tensor, Tensor):
            raise RuntimeError(f"it uses a {type(tensor).__name__} of its own")
        if id(tensor) not in places:
            with graph.inserting_before(first):
                places[id(tensor)] = graph.placeholder(f"captured_{len(captured)}")
            captured.append(tensor)
        node.replace_all_uses_with(places[id(tensor)])
        graph.erase_node(node)
    recorded.recompile()
    return tuple(captured)


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


def _ancestors(nodes: Iterable[fx.Node], known: Collection[fx.Node] = ()) -> set[fx.Node]:
    """Return some nodes and those from which they follow, as far as nodes that are known."""
    pending = list(nodes)
    seen = set(pending)
    while pending:
        node = pending.pop()
        for source in () if node in known else node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                pending.append(source)
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
