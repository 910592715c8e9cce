"""Arithmetic on vectors that are tuples of tensors, one tensor for each parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from .shards import any_sharded, gathered, is_sharded, largest, local, total

Tensors: TypeAlias = tuple[Tensor, ...]

__all__ = [
    "Tensors",
    "add",
    "axpy",
    "axpy_",
    "dot",
    "flatten",
    "is_finite",
    "is_zero",
    "norm",
    "overwrite",
    "scale",
    "subtract",
    "unflatten",
    "zeros_like",
]


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Return the inner product <a, b>, a scalar tensor."""
    if not a:
        return torch.zeros((), device="cpu")
    if any_sharded(a):
        return total([torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in zip(local(a), local(b), strict=True)], a)
    if len(a) == len(b) == 1:
        return torch.dot(a[0].reshape(-1), b[0].reshape(-1))
    return _stacked([torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in zip(a, b, strict=True)]).sum()


def norm(a: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm ||a||, a scalar tensor."""
    if not a:
        return torch.zeros((), device="cpu")
    if any_sharded(a):
        return _shared_norm(a)
    if len(a) == 1:
        single: Tensor = torch.linalg.vector_norm(a[0])
        return single
    total: Tensor = torch.linalg.vector_norm(_stacked(torch._foreach_norm(list(a))))
    return total


def _shared_norm(a: Sequence[Tensor]) -> Tensor:
    """Return the norm of a vector some of whose tensors are sharded; a sum of squares would overflow before."""
    split = [x for x in a if is_sharded(x)]
    own: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(local(split))))
    rest = [torch.linalg.vector_norm(x) for x in a if not is_sharded(x)]
    size: Tensor = torch.linalg.vector_norm(torch.cat([gathered(own, split[0]), *(x.reshape(1) for x in rest)]))
    return size


def _stacked(scalars: Sequence[Tensor]) -> Tensor:
    """Return scalars as one tensor; those of a level on several devices are copied to the device of the first."""
    try:
        return torch.stack(list(scalars))
    except RuntimeError:
        # Asking each scalar for its device would slow down vectors of many tensors.
        if all(scalar.device == scalars[0].device for scalar in scalars):
            raise
        return torch.stack([scalar.to(scalars[0].device) for scalar in scalars])


def axpy(alpha: float | Tensor, x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensors:
    """Return alpha x + y."""
    if not x:
        return ()
    if isinstance(alpha, Tensor):
        return tuple(torch._foreach_add(list(y), torch._foreach_mul(list(x), alpha)))
    return tuple(torch._foreach_add(list(y), list(x), alpha=alpha))


def axpy_(alpha: Tensor, x: Sequence[Tensor], y: Sequence[Tensor]) -> None:
    """Add alpha x to y in place; alpha is a scalar tensor. On a CPU, new memory would cost more than the arithmetic."""
    if x:
        torch._foreach_addcmul_(list(y), list(x), [alpha] * len(x))


def add(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensors:
    """Return a + b."""
    return tuple(torch._foreach_add(list(a), list(b))) if a else ()


def subtract(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensors:
    """Return a - b."""
    return tuple(torch._foreach_sub(list(a), list(b))) if a else ()


def scale(alpha: float | Tensor, a: Sequence[Tensor]) -> Tensors:
    """Return alpha a; a number on another device than `a` is copied to it."""
    if isinstance(alpha, Tensor) and a and alpha.device != a[0].device:
        alpha = alpha.to(a[0].device)
    return tuple(torch._foreach_mul(list(a), alpha)) if a else ()


def zeros_like(a: Sequence[Tensor]) -> Tensors:
    """Return zeros of the same shapes, detached."""
    return tuple(torch.zeros_like(x, requires_grad=False) for x in a)


def is_finite(a: Sequence[Tensor]) -> bool:
    """Return whether all components are finite."""
    return math.isfinite(float(norm(a)))


def is_zero(a: Sequence[Tensor]) -> bool:
    """Return whether all components are zero; the same in every process."""
    if any_sharded(a):
        return all(largest(x) == 0.0 for x in a)
    return not any(bool(x.any()) for x in a)


def overwrite(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """Copy the components of b to a, in place."""
    if any_sharded(a):
        a, b = local(a), local(b)
    torch._foreach_copy_(list(a), list(b))


def flatten(a: Sequence[Tensor]) -> Tensor:
    """Return the components of a as one tensor of shape (n,)."""
    return torch.cat([x.reshape(-1) for x in a]) if a else torch.zeros(0, device="cpu")


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> Tensors:
    """Return a tensor of shape (n,) split into the shapes of `like`."""
    pieces = flat.split_with_sizes([x.numel() for x in like])
    return tuple([piece.reshape(x.shape) for piece, x in zip(pieces, like, strict=True)])
