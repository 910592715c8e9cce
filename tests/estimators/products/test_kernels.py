"""Kernels whose second or third derivatives torch computes wrongly, against the same functions written in primitives here."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from core_cases import distance, flat, gradient_of, point_of
from torch import Tensor, nn
from torch.nn import functional, utils

import mlopt
from mlopt.estimators.products.kernels import differentiable_kernels
from mlopt.problem import Objective, Primitives
from mlopt.testing import quadratic

IN, WIDTH = 3, 4


class ByHand(nn.Module):
    """A norm over given dimensions of (n, WIDTH, 2) inputs, in primitives; of groups of channels if there are several."""

    def __init__(self, dims: tuple[int, ...], groups: int = WIDTH, by_channel: bool = True) -> None:
        super().__init__()
        shape = (WIDTH, 1) if by_channel else (WIDTH, 2)
        self.weight, self.bias = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))
        self._dims, self._groups = dims, groups

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.reshape(len(x), self._groups, WIDTH // self._groups, 2)
        centred = grouped - grouped.mean(self._dims, keepdim=True)
        deviation = (centred.square().mean(self._dims, keepdim=True) + 1e-5).sqrt()
        return (centred / deviation).reshape(x.shape) * self.weight + self.bias


NORMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "layer": (lambda: nn.LayerNorm((WIDTH, 2)), lambda: ByHand((1, 2, 3), by_channel=False)),
    "batch": (lambda: nn.BatchNorm1d(WIDTH), lambda: ByHand((0, 2, 3))),
    "group": (lambda: nn.GroupNorm(2, WIDTH), lambda: ByHand((2, 3), groups=2)),
    "instance": (lambda: nn.InstanceNorm1d(WIDTH, affine=True), lambda: ByHand((2, 3))),
}


class Network(nn.Module):
    """A network with a norm in the middle; the same parameters for every norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(IN, 2 * WIDTH), nn.Linear(2 * WIDTH, 1)
            weight, bias = 1 + torch.randn(2 * WIDTH) / 5, torch.randn(2 * WIDTH) / 5
        self.norm = norm
        for parameter, drawn in zip(norm.parameters(), (weight, bias), strict=True):
            parameter.data.copy_(drawn[: parameter.numel()].view_as(parameter))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(x).view(-1, WIDTH, 2))
        return self.last(torch.tanh(hidden).flatten(1)).squeeze(1)


def nested(norm: nn.Module, estimator: mlopt.Estimator) -> mlopt.Problem:
    """Return three levels, of which the middle one's objective depends on the solution of a network with a norm."""
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=generator)
    inputs, targets, start, top = draw(8, IN), draw(8), draw(IN), draw(IN)

    def outer(top: nn.Module, batch: Any, *, middle: nn.Module) -> Tensor:
        return (middle() - 1).square().sum()

    def middle(middle: nn.Module, batch: Any, *, top: nn.Module, network: nn.Module) -> Tensor:
        return (network(inputs.flip(0)) - targets).square().mean() + 2 * (middle() - top()).square().sum()

    def inner(network: nn.Module, batch: Any, *, middle: nn.Module) -> Tensor:
        shrunk = sum(p.square().sum() for p in network.parameters())
        return (network(inputs * (1 + middle().tanh())) - targets).square().mean() + shrunk

    return mlopt.Problem(
        mlopt.Level("top", mlopt.variables(top), outer),
        mlopt.Level("middle", mlopt.variables(start), middle, estimator=estimator),
        mlopt.Level("network", Network(norm), inner, estimator=estimator),
    )


@pytest.mark.parametrize(
    ("products", "tolerance"), [("autograd", 1e-8), ("forward", 1e-8), ("finite_difference", 1e-4)]
)
@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_in_a_nested_network(norm: str, products: str, tolerance: float) -> None:
    fused, by_hand = NORMS[norm]
    expected = gradient_of(nested(by_hand(), mlopt.Dense()))
    assert distance(gradient_of(nested(fused(), mlopt.Dense(products=products))), expected) < tolerance


@pytest.mark.parametrize("norm", NORMS)
def test_the_dense_oracle_has_third_derivatives_right(norm: str) -> None:
    problem = nested(NORMS[norm][0](), mlopt.Dense(products="finite_difference"))
    mlopt.check_hypergradient(problem, oracle="dense", tolerance=1e-4)


@pytest.mark.parametrize("products", ["autograd", "forward", "finite_difference"])
def test_a_mean_of_squares_in_a_nested_network(products: str) -> None:
    """Torch fails on the mean of `mse_loss` in nested forward mode; the differences of the squares are primitives."""

    def gradient(fused: bool, products: str) -> Tensor:
        def squares(value: Tensor) -> Tensor:
            return functional.mse_loss(value, torch.ones(3)) if fused else (value - 1).square().mean()

        def outer(x: nn.Module, batch: Any, *, y: nn.Module) -> Tensor:
            return squares(y() * x())

        def middle(y: nn.Module, batch: Any, *, x: nn.Module, z: nn.Module) -> Tensor:
            return squares(y() * z()) + (y() - x()).square().sum()

        def inner(z: nn.Module, batch: Any, *, y: nn.Module) -> Tensor:
            return squares(z().exp() * y()) + z().square().sum()

        estimator = mlopt.Dense(products=products)
        levels = {"x": (outer, None), "y": (middle, estimator), "z": (inner, estimator)}
        start = torch.linspace(0.2, 0.8, 3)
        return gradient_of(
            mlopt.Problem(
                *(mlopt.Level(name, mlopt.variables(start), f, estimator=e) for name, (f, e) in levels.items())
            )
        )

    assert distance(gradient(True, products), gradient(False, "autograd")) < 1e-5


def test_running_statistics_are_untouched() -> None:
    problem = nested(nn.BatchNorm1d(WIDTH), mlopt.Dense())
    before = copy.deepcopy(problem["network"].module.state_dict())
    mlopt.hypergradient(problem)
    after = problem["network"].module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


class WeightNormByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias, self.g, self.v = (nn.Parameter(torch.zeros(s)) for s in ((WIDTH,), (WIDTH, 1), (WIDTH, IN)))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.v * (self.g / self.v.square().sum(1, keepdim=True).sqrt())).T + self.bias


def weight_normed(kind: str) -> nn.Module:
    """Return a linear layer with weight norm; its parameters are the bias, lengths and directions, in this order."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        layer = nn.Linear(IN, WIDTH)
    if kind == "by hand":
        module = WeightNormByHand()
        start = (layer.bias, layer.weight.norm(dim=1, keepdim=True), layer.weight)
        for parameter, value in zip(module.parameters(), start, strict=True):
            parameter.data.copy_(value.data)
        return module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return utils.weight_norm(layer) if kind == "hook" else utils.parametrizations.weight_norm(layer)


def meta_learning(kind: str, estimator: mlopt.Estimator) -> mlopt.Problem:
    """Return a network that starts at, and is drawn towards, the outer variables."""
    generator = torch.Generator().manual_seed(3)
    inputs, targets = torch.randn(6, IN, generator=generator), torch.randn(6, WIDTH, generator=generator)

    def inner(network: nn.Module, batch: Any, *, start: nn.Module) -> Tensor:
        pairs = zip(network.parameters(), start.parameters(), strict=True)
        return (network(inputs).tanh() - targets).square().mean() + sum((p - q).square().sum() for p, q in pairs)

    def outer(start: nn.Module, batch: Any, *, network: nn.Module) -> Tensor:
        return (network(inputs.flip(0)) - targets).square().mean()

    return mlopt.Problem(
        mlopt.Level("start", weight_normed(kind), outer),
        mlopt.Level(
            "network",
            weight_normed(kind),
            inner,
            optimizer=partial(torch.optim.SGD, lr=0.2),
            estimator=estimator,
        ),
    )


def maml_by_hand(steps: int) -> Tensor:
    """Return the gradient through steps of gradient descent, on weight norm in primitives, by autograd through the loop."""
    problem = meta_learning("by hand", mlopt.Unrolled(steps=steps, start="start"))
    start, network = problem["start"], problem["network"]
    leaves = [parameter.detach().clone().requires_grad_() for parameter in start.parameters]
    names = list(start.parameter_names)
    position = [leaf.clone() for leaf in leaves]

    class At(nn.Module):
        def __init__(self, values: list[Tensor]) -> None:
            super().__init__()
            self._values = values

        def parameters(self, recurse: bool = True) -> Any:
            return iter(self._values)

        def forward(self, x: Tensor) -> Tensor:
            bias, g, v = self._values
            return x @ (v * (g / v.square().sum(1, keepdim=True).sqrt())).T + bias

    assert names == ["bias", "g", "v"]
    for _ in range(steps):
        value = network.loss(At(position), None, start=At(leaves))
        gradient = torch.autograd.grad(value, position, create_graph=True)
        position = [x - 0.2 * g for x, g in zip(position, gradient, strict=True)]
    value = start.loss(At(leaves), None, network=At(position))
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, leaves)])


@pytest.mark.parametrize("products", ["autograd", "forward"])
@pytest.mark.parametrize("kind", ["parametrization", "hook"])
def test_weight_norm_unrolled_from_the_outer_variables(kind: str, products: str) -> None:
    problem = meta_learning(kind, mlopt.Unrolled(steps=3, start="start", products=products))
    assert distance(gradient_of(problem), maml_by_hand(3)) < 1e-8


@pytest.mark.parametrize(
    "options",
    [{"products": "autograd"}, {"products": "forward"}, {"products": "forward", "compile": True}],
    ids=["autograd", "forward", "compiled"],
)
def test_weight_norm_by_implicit_differentiation(options: dict[str, Any]) -> None:
    solve = partial(mlopt.ConjugateGradient, iterations=40, rtol=1e-12)
    expected = gradient_of(meta_learning("by hand", solve()))
    assert distance(gradient_of(meta_learning("parametrization", solve(**options))), expected) < 1e-8


def test_a_problem_without_such_kernels_pays_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(mode: Primitives) -> None:
        raise AssertionError("the mode was entered")

    for products in ("autograd", "forward"):
        problem = meta_learning("by hand", mlopt.Dense(products=products))
        with monkeypatch.context() as patched:
            patched.setattr(Primitives, "__enter__", refuse)
            mlopt.hypergradient(problem)
        with monkeypatch.context() as patched:
            patched.setattr(Primitives, "__enter__", refuse)
            problem = meta_learning("hook", mlopt.Dense(products=products))
            with pytest.raises(AssertionError, match="entered"):
                mlopt.hypergradient(problem)


class Hidden(nn.Module):
    """A layer norm that TorchScript calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(WIDTH, 2)), nn.Parameter(torch.zeros(WIDTH, 2))

    def forward(self, x: Tensor) -> Tensor:
        return _scripted(x, self.weight, self.bias)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, [4, 2], weight, bias)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    _scripted = torch.jit.script(_layer_norm)


@pytest.mark.parametrize("products", ["autograd", "forward"])
def test_a_kernel_inside_a_script_is_refused(products: str) -> None:
    with pytest.raises(mlopt.SecondDerivativeError, match=r"NativeLayerNorm.*TorchScript"):
        mlopt.hypergradient(nested(Hidden(), mlopt.Dense(products=products)))


def test_flat_order_of_parameters() -> None:
    """The comparisons above rely on one order of the parameters for every kind of weight norm."""
    shapes = {
        kind: [tuple(p.shape) for p in weight_normed(kind).parameters()]
        for kind in ("by hand", "hook", "parametrization")
    }
    assert len(set(map(str, shapes.values()))) == 1
    assert len(flat(mlopt.hypergradient(meta_learning("hook", mlopt.Identity())).gradient)) == WIDTH * (2 + IN)


def test_regions_of_two_threads_that_overlap_leave_the_fused_kernels_on() -> None:
    """The first region ends while the second is open, as regions of two threads may."""
    problem = quadratic("two", mlopt.Dense()).problem
    (term,) = Objective.of(problem["y"], point_of(problem)).terms
    flags = (
        torch.backends.cuda.flash_sdp_enabled,
        torch.backends.cuda.mem_efficient_sdp_enabled,
        torch.backends.cuda.math_sdp_enabled,
    )
    before = [flag() for flag in flags]
    first, second = differentiable_kernels(term), differentiable_kernels(term)
    first.__enter__()
    second.__enter__()
    assert [flag() for flag in flags] == [False, False, True]
    first.__exit__(None, None, None)
    assert [flag() for flag in flags] == [False, False, True]
    second.__exit__(None, None, None)
    assert [flag() for flag in flags] == before
