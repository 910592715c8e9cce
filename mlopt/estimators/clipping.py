"""The clipping of a step's gradient, as a function and as a linear map."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from ..linear import AssumedInverse
from ..tensors import Tensors, axpy, dot, norm, scale

__all__ = ["ClippedInverse", "clip_factor", "clipped"]

#: Added to the norm by `torch.nn.utils.clip_grad_norm_`.
_EPSILON = 1e-6


def clip_factor(size: Tensor, limit: float) -> Tensor:
    """Return the factor min(1, limit / ||g||) for a gradient of norm `size`, as torch computes it."""
    return (limit / (size + _EPSILON)).clamp(max=1.0)


def clipped(gradient: Tensors, limit: float | None) -> Tensors:
    """Return a gradient scaled down to a norm of at most `limit`; the same gradient if that is None."""
    if limit is None:
        return gradient
    factor = clip_factor(norm(gradient), limit)
    # Autograd raises on torch._foreach_mul by a scalar tensor with a graph (torch 2.13).
    return tuple(factor * g for g in gradient)


@attrs.frozen(kw_only=True, eq=False)
class ClippedInverse(AssumedInverse):
    """Assume A^-1 = P D, with D the assumed inverse of another rule and P the derivative of clipping at a gradient g.

    With k = limit / ||g|| < 1, P = k (I - g g^T / ||g||^2); the gradient is not clipped, and P = I, if k >= 1.

    Args:
        inverse: the rule with D.
        gradient: g, or any positive multiple of it, in the shapes of b.
        size: ||g||, a scalar tensor.
        limit: the largest norm.
    """

    inverse: AssumedInverse = attrs.field(repr=False)
    gradient: Tensors = attrs.field(repr=False)
    size: Tensor = attrs.field(repr=False)
    limit: float = attrs.field(repr=False)

    def image(self, vector: Tensors) -> Tensors:
        value = self.inverse.image(vector)
        factor = clip_factor(self.size, self.limit)
        # torch's small addition to the norm takes part in the derivative.
        share = (factor < 1) * self.size / (self.size + _EPSILON)
        # The vectors are finer than the gradient if the variables are in half precision.
        gradient = tuple(g.to(v.dtype) for g, v in zip(self.gradient, value, strict=True))
        square = dot(gradient, gradient)
        along = dot(gradient, value) / square.clamp_min(torch.finfo(square.dtype).tiny)
        return scale(factor, axpy(-share * along, gradient, value))
