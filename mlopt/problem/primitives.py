"""Primitive forms of the functions whose higher derivatives torch computes wrongly, and a context that uses them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["FAULTS", "Fault", "Primitives", "faults"]


class Primitives(TorchFunctionMode):
    """Evaluate functions in primitive operations if torch computes their derivatives wrongly at some order.

    The values are those of the fused kernels, to rounding. A context for the tracing of a loss: the derivatives of the traced
    graph are then right at every order, in reverse and in forward mode. Calls from C++ (TorchScript) are not replaced.

    Args:
        order: the highest order of derivative to be taken; functions that are right up to it keep their kernels.

    Example:
        >>> norm, inputs = torch.nn.LayerNorm(3), torch.tensor([[1.0, 2.0, 4.0]])
        >>> with mlopt.problem.Primitives(3):
        ...     values = norm(inputs)
        >>> torch.allclose(values, norm(inputs)), type(values.grad_fn).__name__
        (True, 'AddBackward0')
    """

    def __init__(self, order: int) -> None:
        super().__init__()
        self._forms = _forms(order)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._forms.get(func, func)(*args, **(kwargs or {}))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    x = _wide(input)
    # On a GPU, autocast has layer norm return float32.
    cast = input.device.type == "cuda" and torch.is_autocast_enabled("cuda")
    with torch.autocast(input.device.type, enabled=False):
        mean, variance = _moments(x, dims)
        return _standardised(x, mean, variance, weight, bias, eps).to(torch.float32 if cast else input.dtype)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    return _channel_norm(
        input, (0, *range(2, input.ndim)), running_mean, running_var, weight, bias, training, momentum, eps
    )


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    dims = tuple(range(2, input.ndim))
    return _channel_norm(input, dims, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _channel_norm(
    input: Tensor,
    dims: tuple[int, ...],
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Return the norm of each channel over `dims`; in training, move the running statistics as the fused kernels do."""
    channels = (1, -1, *(1 for _ in range(2, input.ndim)))
    x = _wide(input)
    with torch.autocast(input.device.type, enabled=False):
        if training:
            mean, variance = _moments(x, dims)
            count = x.numel() // mean.numel()
            _track(running_mean, mean, momentum)
            _track(running_var, variance * (count / max(count - 1, 1)), momentum)
        else:
            assert running_mean is not None
            assert running_var is not None
            mean, variance = (_wide(running).view(channels) for running in (running_mean, running_var))
        scale, shift = (None if p is None else p.view(channels) for p in (weight, bias))
        return _standardised(x, mean, variance, scale, shift, eps).to(input.dtype)


def _moments(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance over `dims`, which are kept."""
    mean = x.mean(dims, keepdim=True)
    return mean, (x - mean).square().mean(dims, keepdim=True)


def _standardised(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    x = (x - mean) * (variance + eps).rsqrt()
    x = x if weight is None else x * _wide(weight)
    return x if bias is None else x + _wide(bias)


def _track(running: Tensor | None, present: Tensor, momentum: float) -> None:
    """Move a running statistic (C,) in place towards the present one, (1, C, ...) or (N, C, ...)."""
    if running is not None:
        by_channel = present.detach().transpose(0, 1).reshape(len(running), -1).mean(1)
        running.mul_(1 - momentum).add_(by_channel.to(running.dtype), alpha=momentum)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    dims = [k for k in range(v.ndim) if dim == -1 or k != dim]
    with torch.autocast(v.device.type, enabled=False):
        wide = _wide(v)
        length: Tensor = torch.linalg.vector_norm(wide, dim=dims, keepdim=True)
        return (wide * (_wide(g) / length)).to(v.dtype)


def _mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    if weight is not None or size_average is not None or reduce is not None:
        return functional.mse_loss(input, target, size_average, reduce, reduction, weight)  # type: ignore[call-arg]
    squares = (input - target).square()
    return squares if reduction == "none" else squares.mean() if reduction == "mean" else squares.sum()


def _wide(x: Tensor) -> Tensor:
    """Return a tensor in a dtype fit for moments, as the fused kernels accumulate."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


@attrs.frozen
class Fault:
    """Functions with a kernel whose derivatives are wrong from some order on.

    Attributes:
        order: the lowest order at which the derivative is wrong.
        nodes: prefixes of the names of the kernel's nodes in a graph.
        forms: each function with its primitive form.
        forward: True if reverse mode is right.
    """

    order: int
    nodes: tuple[str, ...]
    forms: tuple[tuple[Callable[..., Any], Callable[..., Any]], ...]
    forward: bool = False


#: The faults, as measured by `mlopt derivatives` on torch 2.13; docs/estimators.md has the table. The list does not depend on the
#: version of torch: a primitive form is right on each, and costs time only, where a measurement at run time would also cost the
#: runs that need none. A test measures each entry, and fails when torch has fixed it.
FAULTS: tuple[Fault, ...] = (
    Fault(2, ("WeightNorm",), ((torch._weight_norm, _weight_norm),)),
    Fault(3, ("NativeLayerNorm",), ((functional.layer_norm, _layer_norm), (torch.layer_norm, _layer_norm))),
    Fault(
        3,
        ("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm"),
        ((functional.batch_norm, _batch_norm), (functional.instance_norm, _instance_norm)),
    ),
    # The forward mode of the mean over its elements is an error of torch (on a tangent of zeros).
    Fault(2, ("MseLoss",), ((functional.mse_loss, _mse_loss),), forward=True),
)


@cache
def _forms(order: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the primitive forms, by function, of those that are wrong at some order up to this."""
    return dict(pair for fault in FAULTS if fault.order <= order for pair in fault.forms)


def faults(names: Iterable[str], order: int, *, forward: bool) -> list[str]:
    """Return the nodes among `names` of kernels whose derivatives of this order are wrong, in reverse or also in forward mode."""
    apply = [fault for fault in FAULTS if fault.order <= order and (forward or not fault.forward)]
    prefixes = tuple(prefix for fault in apply for prefix in fault.nodes)
    return sorted(name for name in set(names) if name.startswith(prefixes))
