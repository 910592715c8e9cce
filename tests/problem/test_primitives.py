"""The primitive forms have the values of the fused kernels, and move the same running statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import utils

from mlopt.problem import FAULTS, Primitives

MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer": (lambda: nn.LayerNorm((3, 2)), (4, 3, 2)),
    "layer without parameters": (lambda: nn.LayerNorm(2, elementwise_affine=False), (4, 3, 2)),
    "batch": (lambda: nn.BatchNorm1d(3), (4, 3)),
    "batch, cumulative average": (lambda: nn.BatchNorm2d(3, momentum=None), (4, 3, 2, 2)),
    "batch without running statistics": (lambda: nn.BatchNorm1d(3, track_running_stats=False), (4, 3, 5)),
    "instance": (lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True), (4, 3, 5)),
    "instance without parameters": (lambda: nn.InstanceNorm2d(3), (4, 3, 2, 2)),
    "weight": (lambda: utils.parametrizations.weight_norm(nn.Linear(3, 2)), (4, 3)),
    "weight, last dimension": (lambda: utils.parametrizations.weight_norm(nn.Linear(3, 2), dim=1), (4, 3)),
    "weight, all dimensions": (lambda: utils.parametrizations.weight_norm(nn.Linear(3, 2), dim=-1), (4, 3)),
}


def made(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    build, shape = MODULES[name]
    module = build()
    for parameter in module.parameters():
        parameter.data.add_(torch.randn_like(parameter) / 3)
    return module, 2 + torch.randn(shape)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_values_and_running_statistics(name: str, training: bool) -> None:
    fused, x = made(name)
    fused.train(training)
    primitive = copy.deepcopy(fused)
    for _ in range(2):
        expected = fused(x)
        with Primitives(3):
            value = primitive(x)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        assert all(not node.startswith(("Native", "WeightNorm")) for node in nodes(value))
    for kept, moved in zip(fused.buffers(), primitive.buffers(), strict=True):
        torch.testing.assert_close(moved, kept, rtol=1e-12, atol=1e-12)


def nodes(value: torch.Tensor) -> set[str]:
    pending, seen = [value.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending += [following for following, _ in node.next_functions]
    return {node.name() for node in seen}


@pytest.mark.parametrize("name", ["layer", "batch", "instance"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(name: str, dtype: torch.dtype, autocast: bool) -> None:
    module, x = made(name)
    module, x = module.float(), x.to(dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        expected = module(x)
        with Primitives(3):
            value = module(x)
    assert value.dtype == expected.dtype
    torch.testing.assert_close(value, expected, rtol=2e-2, atol=2e-2)


def test_a_function_that_is_right_up_to_the_order_keeps_its_kernel() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    with Primitives(2):
        assert nodes(nn.LayerNorm(3)(x)) >= {"NativeLayerNormBackward0"}
    assert {fault.order for fault in FAULTS} == {2, 3}
