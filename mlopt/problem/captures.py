"""The tensors that an evaluation of a term reads: where they are found again at another point, and what is fixed about them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..tensors import Tensors
from .batch import copied, described
from .term import LevelTerm

__all__ = ["Captures", "setting"]


class Captures:
    """The places of captured tensors at any point: the variables, the batch, a module, or the captured tensors themselves.

    Args:
        term: the term whose evaluation captured them.
        tensors: the captured tensors.

    Raises:
        RuntimeError: a tensor was computed outside the evaluation from others that require a gradient.
    """

    def __init__(self, term: LevelTerm, tensors: Sequence[Tensor]) -> None:
        if any(x.grad_fn is not None for x in tensors):
            raise RuntimeError("it uses a tensor that was computed before, with a graph of its own")
        places: dict[int, Callable[[LevelTerm, Tensors], Tensor]] = {}
        for module in _modules(term):
            for owned in (module._parameters, module._buffers):
                places |= {id(x): _entry(owned, name) for name, x in owned.items() if x is not None}
        places |= {id(x): _position(k) for k, x in reversed(list(enumerate(_batch(term))))}
        places |= {id(x): _variable(b, k) for b in term.blocks for k, x in enumerate(term.values[b])}
        self._places = [places.get(id(x)) or _itself(x) for x in tensors]

    def at(self, term: LevelTerm) -> Tensors:
        """Return the tensors for the point of a term, without graphs."""
        batch = _batch(term)
        return tuple([place(term, batch).detach() for place in self._places])


def setting(term: LevelTerm) -> Hashable:
    """Return what a trace of a term takes to be fixed: shapes, strides, dtypes, modes, hooks, plain values in its batch, kernels.

    Raises:
        ProblemError: the batch holds an object whose content is out of reach.
    """
    blocks = sorted(term.blocks, key=str)
    variables = [
        (x.shape, x.stride(), x.dtype, x.device, x.requires_grad, *(x._backward_hooks or ()))
        for b in blocks
        for x in term.values[b]
    ]
    modules = [(m.training, *m._forward_pre_hooks, *m._forward_hooks) for m in _modules(term)]
    buffers = [
        (x.shape, x.stride(), x.dtype, x.device) if x.layout == torch.strided else x.layout
        for m in _modules(term)
        for x in m._buffers.values()
        if x is not None
    ]
    first: dict[int, int] = {}
    alike = [first.setdefault(id(x), k) for k, x in enumerate(_batch(term))]
    kinds = {variable.device.type for block in blocks for variable in term.values[block]}
    casts = [torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in sorted(kinds)]
    # They choose kernels when code is compiled.
    kernels = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    fixed = described(term.batch), tuple(alike), tuple(casts), kernels
    return term.sign, tuple(variables), tuple(modules), tuple(buffers), *fixed


def _modules(term: LevelTerm) -> Iterator[nn.Module]:
    for block in sorted(term.blocks, key=str):
        yield from term.point.problem[str(block)].module.modules()


def _batch(term: LevelTerm) -> Tensors:
    tensors: list[Tensor] = []
    copied(term.batch, tensors)
    return tuple(tensors)


def _variable(block: Any, k: int) -> Callable[[LevelTerm, Tensors], Tensor]:
    return lambda term, batch: term.values[block][k]


def _position(k: int) -> Callable[[LevelTerm, Tensors], Tensor]:
    return lambda term, batch: batch[k]


def _entry(owned: dict[str, Any], name: str) -> Callable[[LevelTerm, Tensors], Tensor]:
    return lambda term, batch: owned[name]


def _itself(tensor: Tensor) -> Callable[[LevelTerm, Tensors], Tensor]:
    return lambda term, batch: tensor
