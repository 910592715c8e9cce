"""The tensors that an evaluation of a term reads: where they are found again at another point, and what is fixed about them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules import module as all_modules

from ..tensors import Tensors
from .batch import copied, described
from .estimator import Block
from .term import LevelTerm

__all__ = ["Captures", "setting"]

#: Hooks of all modules.
_GLOBAL_HOOKS = (
    all_modules._global_forward_pre_hooks,
    all_modules._global_forward_hooks,
    all_modules._global_backward_pre_hooks,
    all_modules._global_backward_hooks,
)
#: Finds a tensor again at the point of a term, among those that are given there.
_Place = Callable[[LevelTerm, Tensors], Tensor]


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
        places: dict[int, _Place] = {id(x): _position(k) for k, x in reversed(list(enumerate(_given(term))))}
        places |= {id(x): _variable(b, k) for b in term.blocks for k, x in enumerate(term.values[b])}
        self._places = [places.get(id(x)) or _itself(x) for x in tensors]

    def at(self, term: LevelTerm) -> Tensors:
        """Return the tensors for the point of a term, without graphs."""
        given = _given(term)
        return tuple([place(term, given).detach() for place in self._places])


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
    modules = [
        (type(m), m.training, *m._forward_pre_hooks, *m._forward_hooks, *m._backward_pre_hooks, *m._backward_hooks)
        for m in _modules(term)
    ]
    everywhere = tuple([key for own in _GLOBAL_HOOKS for key in own])
    owned = _owned(term)
    layouts = [
        (x.shape, x.stride(), x.dtype, x.device, x.requires_grad) if x.layout == torch.strided else x.layout
        for x in owned
    ]
    # A loss may take one tensor in two roles, such as a batch that is a buffer too.
    first: dict[int, int] = {}
    alike = [first.setdefault(id(x), k) for k, x in enumerate((*owned, *_batch(term)))]
    kinds = {variable.device.type for block in blocks for variable in term.values[block]}
    casts = [torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in sorted(kinds)]
    # They choose kernels when code is compiled.
    kernels = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    fixed = described(term.batch), tuple(alike), tuple(casts), kernels
    return term.sign, tuple(variables), tuple(modules), everywhere, tuple(layouts), *fixed


def _modules(term: LevelTerm) -> Iterator[nn.Module]:
    for block in sorted(term.blocks, key=str):
        yield from term.point.problem[str(block)].module.modules()


def _batch(term: LevelTerm) -> Tensors:
    tensors: list[Tensor] = []
    copied(term.batch, tensors)
    return tuple(tensors)


def _owned(term: LevelTerm) -> Tensors:
    """Return the parameters and buffers of the modules of a term, frozen ones included."""
    owned = ((*m._parameters.values(), *m._buffers.values()) for m in _modules(term))
    return tuple([x for own in owned for x in own if x is not None])


def _given(term: LevelTerm) -> Tensors:
    return *_batch(term), *_owned(term)


def _variable(block: Block, k: int) -> _Place:
    return lambda term, given: term.values[block][k]


def _position(k: int) -> _Place:
    return lambda term, given: given[k]


def _itself(tensor: Tensor) -> _Place:
    return lambda term, given: tensor
