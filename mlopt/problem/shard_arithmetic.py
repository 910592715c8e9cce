"""The arithmetic of regularizers on sharded parameters: the operations whose results do not depend on the sharding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ProblemError
from ..shards import is_sharded

__all__ = ["ShardArithmetic"]

#: Operations by the names that torch.ops.aten has for them; those that work in place end in an underscore.
_EXACT = (
    # of each entry by itself
    "abs acos add addcdiv addcmul asin atan bitwise_and bitwise_not bitwise_or clamp clamp_max clamp_min cos cosh div elu eq erf "
    "exp expm1 ge gelu gt hardtanh le leaky_relu lerp log log1p log2 logical_and logical_not logical_or lt masked_fill maximum "
    "minimum mul ne neg pow reciprocal relu rsqrt rsub sgn sigmoid sign silu sin sinh softplus sqrt sub tan tanh threshold where "
    "xlogy "
    # without arithmetic
    "_to_copy alias clone copy detach empty_like expand full_like lift_fresh new_zeros ones_like squeeze stack t transpose "
    "unsqueeze zeros_like "
    # over entries
    "linalg_vector_norm mean sum"
)


class ShardArithmetic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuse operations on sharded parameters inside that torch does not compute as on whole ones, or not in every case.

    Torch takes the mean of a loss function over the entries of one process, adds the norms of shards, and has no maximum of an
    empty shard: only the process without entries raises. The refusal is the same in all processes.

    Args:
        name: the level, for the error.

    Raises:
        ProblemError: there was such an operation.
    """

    def __init__(self, name: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._name = name

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not any(map(is_sharded, _operands(args))):
            return func(*args, **(kwargs or {}))
        operation = func.overloadpacket.__name__
        if (
            func.namespace != "aten"
            or operation.removesuffix("_") not in _EXACT.split()
            or _is_norm_of_parts(operation, args)
        ):
            raise ProblemError(
                f"the regularizer of level {self._name!r} applies {operation} to parameters that fully_shard has sharded, which "
                "may differ from that of whole ones; use mlopt.shards.whole(parameter) there, or sums, means and norms of entries"
            )
        return _reduced(func(*args, **(kwargs or {})))


def _operands(args: Sequence[Any]) -> list[Any]:
    return [x for own in args for x in (own if isinstance(own, (list, tuple)) else (own,))]


def _is_norm_of_parts(operation: str, args: Sequence[Any]) -> bool:
    """Return True for norms of rows or columns, and for norms that are no sums of powers."""
    if operation != "linalg_vector_norm":
        return False
    order = args[1] if len(args) > 1 else 2
    return not 0.0 < float(order) < float("inf") or (len(args) > 2 and args[2] is not None)


def _reduced(value: Any) -> Any:
    """Return the norm of all shards at once: torch would add those of each process where they are added or stacked."""
    if is_sharded(value) and any(p.is_partial() and type(p).__name__ != "Partial" for p in value.placements):
        from torch.distributed.tensor import Replicate

        with torch.no_grad():
            return value.redistribute(placements=[Replicate() for _ in value.placements])
    return value
