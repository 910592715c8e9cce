"""Compiled products where something of a level changes between calls: strides, shapes and dtypes, submodules, hooks, roles."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from core_cases import distance, gradient_of
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim import SGD, Adam

import mlopt
from mlopt.estimators.products import traced

INPUTS = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
COSTS = torch.arange(9.0, dtype=torch.float64).reshape(3, 3)
#: Validation losses whose gradients by a matrix are dense, expanded and transposed.
OUTER: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda matrix: (matrix * COSTS).sum(),
    "expanded": lambda matrix: matrix.sum(),
    "transposed": lambda matrix: (matrix.t() * COSTS).sum(),
}


class Scaled(nn.Module):
    """A matrix, applied to inputs that a buffer scales."""

    scales: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(COSTS.cos())
        self.register_buffer("scales", torch.ones(3, 1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scales) @ self.matrix


def relayout(module: Scaled) -> None:
    module.matrix.data = module.matrix.data.t().contiguous().t()


def expand(module: Scaled) -> None:
    module.scales = torch.full((1, 3), 1.7, dtype=torch.float64).expand(3, 3)


def narrow(module: Scaled) -> None:
    module.scales = torch.full((3, 1), 1.7)


def problem_of(network: Scaled, rule: Any) -> mlopt.Problem:
    def outer(weights: nn.Module, batch: str, *, network: nn.Module) -> Tensor:
        return OUTER[batch](network.matrix)

    def inner(module: nn.Module, inputs: Tensor, *, weights: nn.Module) -> Tensor:
        return (module(inputs) - 1).square().mean() * weights().exp().sum() + 0.1 * module.matrix.square().sum()

    return mlopt.Problem(
        mlopt.Level("weights", mlopt.variables(torch.zeros(2, dtype=torch.float64)), outer, data=list(OUTER)),
        mlopt.Level("network", network, inner, data=[INPUTS], estimator=rule),
    )


def identity(**options: Any) -> mlopt.Identity:
    return mlopt.Identity(**options)


def gradients(**options: Any) -> mlopt.ConjugateGradient:
    return mlopt.ConjugateGradient(iterations=3, **options)


@pytest.mark.parametrize("change", [None, relayout, expand, narrow])
@pytest.mark.parametrize("rule", [identity, gradients])
def test_layouts_may_change(rule: Any, change: Callable[[Scaled], None] | None) -> None:
    network = Scaled()
    compiled, live = problem_of(network, rule(compile=True)), problem_of(network, rule())
    for batch in ("expanded", "dense", "transposed", "expanded"):
        one, other = (gradient_of(problem, batches={"weights": batch}) for problem in (compiled, live))
        assert distance(one, other) < 1e-12
        if change is not None and batch == "expanded":
            change(network)


class Shifted(nn.Module):
    """A function that shifts by a buffer."""

    shift: Tensor

    def __init__(self, shift: Tensor, function: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.register_buffer("shift", shift)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x + self.shift)


class Sine(Shifted):
    """Another class of the same buffers."""

    def __init__(self, shift: Tensor) -> None:
        super().__init__(shift, torch.sin)


def shift(value: float) -> Tensor:
    return torch.full((3,), value, dtype=torch.float64)


def other_buffers(network: nn.Sequential) -> None:
    network[1] = Shifted(shift(0.7))


def other_class(network: nn.Sequential) -> None:
    network[1] = Sine(shift(0.1))


def other_parameters(network: nn.Sequential) -> None:
    network[0].weight = nn.Parameter(COSTS.sin())


def backward_hook(network: nn.Sequential) -> Any:
    return network[1].register_full_backward_hook(lambda module, inputs, outputs: (3.0 * inputs[0],))


def pre_backward_hook(network: nn.Sequential) -> Any:
    return network[1].register_full_backward_pre_hook(lambda module, outputs: (3.0 * outputs[0],))


def forward_hook(network: nn.Sequential) -> Any:
    return network[1].register_forward_hook(lambda module, inputs, output: 2.0 * output)


def hook_of_all_modules(network: nn.Sequential) -> Any:
    return register_module_forward_hook(lambda module, inputs, output: 2.0 * output if module is network[1] else None)


def pair(network: nn.Module) -> list[mlopt.Problem]:
    """Return a problem with compiled products, and with live ones."""

    def outer(weights: nn.Module, batch: object, *, network: nn.Module) -> Tensor:
        return torch.stack([p.sin().sum() for p in network.parameters()]).sum()

    def inner(module: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
        return ((module(batch) - 1).square().mean(1) * weights().exp()).sum() + (batch * weights()).sum() ** 2

    return [
        mlopt.Problem(
            mlopt.Level("weights", mlopt.variables(torch.zeros(3, dtype=torch.float64)), outer),
            mlopt.Level("network", network, inner, data=[INPUTS], estimator=gradients(damping=1.0, compile=compile)),
        )
        for compile in (True, False)
    ]


@pytest.mark.filterwarnings("ignore:Full backward hook:UserWarning")
@pytest.mark.parametrize(
    "change",
    [
        other_buffers,
        other_class,
        other_parameters,
        backward_hook,
        pre_backward_hook,
        forward_hook,
        hook_of_all_modules,
    ],
)
def test_modules_may_change(change: Callable[[nn.Sequential], Any], replayed: list[Any]) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 3, dtype=torch.float64), Shifted(shift(0.1)))
    problems = pair(network)
    results, handle = [], None
    try:
        for turn in range(2):
            compiled, live = (gradient_of(problem) for problem in problems)
            assert distance(compiled, live) < 1e-12
            results.append(live)
            handle = change(network) if turn == 0 else handle
    finally:
        if handle is not None:
            handle.remove()
    assert distance(*results) > 1e-3


def test_a_batch_may_be_a_buffer_and_then_another_tensor(replayed: list[Any]) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 3, dtype=torch.float64), Shifted(INPUTS.clone()))
    problems = pair(network)
    for batch in (network[1].shift, INPUTS.sin(), network[1].shift, INPUTS.cos()):
        compiled, live = (gradient_of(problem, batches={"network": batch}) for problem in problems)
        assert distance(compiled, live) < 1e-12


def test_a_resumed_run_is_bit_equal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Compiled products round in another way than the live ones that they are compared with, now and then.
    def rounded(graph: Any, arguments: Any) -> Callable[..., list[Tensor]]:
        return lambda *tensors: [(1 + 2**-40) * x for x in graph(*tensors)]

    monkeypatch.setattr(traced, "compiled", rounded)

    def run(folder: Path, *stops: int) -> Tensor:
        for stop in stops:
            torch.manual_seed(0)
            network = nn.Sequential(nn.Linear(3, 3, dtype=torch.float64), Shifted(shift(0.1)))
            compiled, _ = pair(network)
            weights, inner = compiled
            problem = mlopt.Problem(
                mlopt.Level("weights", weights.module, weights.definition, optimizer=partial(Adam, lr=0.1)),
                mlopt.Level(
                    "network",
                    network,
                    inner.definition,
                    data=[INPUTS],
                    estimator=inner.estimator,
                    optimizer=partial(SGD, lr=0.01),
                ),
            )
            options = {"checkpoint": folder, "resume": True, "progress": False}
            mlopt.solve(problem, stop, seed=0, **options)
        return torch.cat([p.detach().reshape(-1) for level in problem for p in level.parameters])

    assert torch.equal(run(tmp_path / "whole", 6), run(tmp_path / "parts", 3, 6))
