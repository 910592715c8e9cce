"""Products of the Hessian of a loss with a vector, on three routes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module], Tensor]


class Scalar(nn.Module):
    """A network whose output is its loss."""

    def __init__(self, network: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self) -> Tensor:
        return self.loss(self.network)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def random_tangent(network: nn.Module) -> list[Tensor]:
    return [torch.randn_like(parameter) for parameter in network.parameters()]


def by_double_backward(network: nn.Module, loss: Loss, tangent: Sequence[Tensor]) -> Tensor:
    parameters = list(network.parameters())
    gradients = torch.autograd.grad(loss(network), parameters, create_graph=True)
    inner = sum((g * t).sum() for g, t in zip(gradients, tangent, strict=True))
    return flat(torch.autograd.grad(inner, parameters, allow_unused=True, materialize_grads=True))


def by_forward_over_reverse(network: nn.Module, loss: Loss, tangent: Sequence[Tensor]) -> Tensor:
    module = Scalar(network, loss)
    point = {name: parameter.detach() for name, parameter in module.named_parameters()}
    gradient = torch.func.grad(lambda parameters: torch.func.functional_call(module, parameters, ()))
    _, products = torch.func.jvp(gradient, (point,), (dict(zip(point, tangent, strict=True)),))
    return flat(list(products.values()))


def by_differences(network: nn.Module, loss: Loss, tangent: Sequence[Tensor], step: float = 1e-6) -> Tensor:
    """Take so small a step that (almost surely) no ReLU changes sides, yet far above float64's rounding."""
    sides = []
    for shift in (step, -step):
        twin = copy.deepcopy(network)
        parameters = list(twin.parameters())
        with torch.no_grad():
            for parameter, t in zip(parameters, tangent, strict=True):
                parameter.add_(shift * t)
        sides.append(flat(torch.autograd.grad(loss(twin), parameters, allow_unused=True, materialize_grads=True)))
    return (sides[0] - sides[1]) / (2 * step)
